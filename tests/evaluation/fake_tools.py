"""llama.cpp's tools without llama.cpp."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from d2q_edge.runtime.tools import Tools


@dataclass(frozen=True)
class FakeTools(Tools):
    """Records calls. llama-quantize copies `result`; llama-bench takes what `seconds` says.

    Attributes:
        result: the file that quantizing gives.
        seconds: returns those of prompt and generation, for the call's number and its options with one of its threads.
        benched: options of every llama-bench call.
        quantized: arguments of every llama-quantize call.
    """

    result: Path = Path()
    seconds: Callable[[int, Mapping[str, str]], tuple[float, float]] = lambda call, options: (1.0, 1.0)
    benched: list[dict[str, str]] = field(default_factory=list)
    quantized: list[list[str]] = field(default_factory=list)

    def find(self, name: str) -> Path:
        return Path(name)

    def run(self, name: str, *arguments: object) -> str:
        assert name == "llama-bench"
        options = {str(k): str(v) for k, v in zip(arguments[::2], arguments[1::2], strict=True)}
        self.benched.append(options)
        runs = []
        for threads in options["-t"].split(","):
            times = self.seconds(len(self.benched), {**options, "-t": threads})
            for prompt, seconds in zip((int(options["-p"]), 0), times, strict=True):
                runs.append({"n_prompt": prompt, "n_threads": int(threads), "avg_ns": seconds * 1e9})
        return json.dumps(runs)

    def follow(self, name: str, *arguments: object, **_: object) -> None:
        words = [str(word) for word in arguments]
        if name == "llama-quantize":
            self.quantized.append(words)
            shutil.copy(self.result, words[-3])
        else:
            Path(words[words.index("-o") + 1]).write_bytes(b"matrix")
