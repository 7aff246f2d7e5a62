"""Measure the speed of GGUF files on this machine with llama-bench.

Files take turns in every round, so that a busy moment of the machine slows all of them alike. What counts is the median
of the rounds, and for a ratio the median of the rounds' ratios.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from d2q_edge.calibration.text import PROSE
from d2q_edge.errors import D2QError
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.options import BenchmarkOptions
from d2q_edge.runtime.llama_model import LlamaVocabulary
from d2q_edge.runtime.tools import INSTALLED, Tools
from d2q_edge.utils.progress import Progress

PROMPT, GENERATION = "prompt", "generation"
AS_IT_IS = "as it is"
STOCK_FORMS: dict[str, tuple[object, ...]] = {"repacked": ("--repack", 1), AS_IT_IS: ("--repack", 0)}
"""llama.cpp can repack a stock type's weights when it loads them, which is faster in one phase and slower in the other;
both are measured, and the better one counts."""

Key = TypeVar("Key", bound=Hashable)


def median_speeds(options: BenchmarkOptions, times: Mapping[str, list[dict[Key, float]]], key: Key) -> dict[str, float]:
    """Return one key's tokens per second by phase, from the median of the rounds, see run_rounds."""
    tokens = {phase: options.prompt if phase.startswith(PROMPT) else options.generation for phase in times}
    return {
        phase: tokens[phase] / statistics.median(seconds[key] for seconds in rounds) for phase, rounds in times.items()
    }


@dataclass(frozen=True)
class Benchmark:
    """Results by phase and number of threads ("prompt-1").

    Attributes:
        options: what was measured.
        speeds: tokens per second, medians over the rounds, by name of the file.
        stock: the same of the stock file; None without one.
        ratios: speed over that of the stock file's better form, medians over the rounds; above 1 the file is faster.
        loading: seconds to load the file from the system's cache, by name, see load_seconds.
    """

    options: BenchmarkOptions
    speeds: dict[str, dict[str, float]]
    stock: dict[str, float] | None
    ratios: dict[str, dict[str, float]] | None
    loading: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return plain values for json.dump."""
        return {
            **asdict(self.options),
            "tokens_per_second": self.speeds,
            "stock_tokens_per_second": self.stock,
            "speed_ratios": self.ratios,
            "load_seconds": self.loading,
        }

    def describe(self, stock_name: str | None = None) -> str:
        """Format a table for a terminal, with a column for each phase and number of threads."""
        rows = dict(self.speeds)
        if self.stock is not None:
            rows[f"{stock_name} (stock)"] = self.stock
        ratios = {f"{name} / stock": values for name, values in (self.ratios or {}).items()}
        phases = [f"{phase}-{threads}" for phase in (PROMPT, GENERATION) for threads in self.options.threads]
        width = max(map(len, ("tokens/s", *rows, *ratios)))
        lines = [f"{'tokens/s':{width}}" + "".join(f"{phase:>15}" for phase in phases) + f"{'load':>10}"]
        for decimals, block in ((1, rows), (2, ratios)):
            for name, row in block.items():
                cells = "".join(f"{row[phase]:15.{decimals}f}" for phase in phases)
                load = f"{self.loading[name]:8.2f} s" if name in self.loading else " " * 10
                lines.append(f"{name:{width}}{cells}{load}")
        return "\n".join(lines)


def run_rounds(
    runs: Mapping[Key, Sequence[object]], options: BenchmarkOptions, tools: Tools = INSTALLED
) -> dict[str, list[dict[Key, float]]]:
    """Run llama-bench on several files in turn.

    Args:
        runs: for each key, llama-bench's options that name the file (as a Path) and what else is special to it.
        options: what to measure.
        tools: where llama-bench is.

    Returns:
        Seconds by phase and threads ("prompt-1"), then round, then key.

    Raises:
        D2QError: llama-bench isn't built, or can't run a file.
    """
    threads = ",".join(map(str, options.threads))
    arguments = ("-p", options.prompt, "-n", options.generation, "-t", threads, "-r", 1, "-o", "json")
    times: dict[str, list[dict[Key, float]]] = {}
    progress = Progress("Measuring speed", options.rounds * len(runs), "run")
    with tempfile.TemporaryDirectory() as links, progress:
        linked = {key: [_link(word, links) for word in own] for key, own in runs.items()}
        for index in range(options.rounds):
            for key, own in linked.items():
                for run in json.loads(tools.run("llama-bench", *own, *arguments)):
                    phase = f"{PROMPT if run['n_prompt'] else GENERATION}-{run['n_threads']}"
                    rounds = times.setdefault(phase, [{} for _ in range(options.rounds)])
                    rounds[index][key] = run["avg_ns"] / 1e9
                progress.update()
    return times


class _Weights(LlamaVocabulary):
    """A loaded model without a context."""

    vocab_only = False


def load_seconds(path: Path, repack: bool) -> float:
    """Return the seconds in which llama.cpp loads a file, the median of three; `repack` as in BenchmarkOptions.

    The file should be in the system's cache, so that what counts is the rearranging and not the disk.
    """
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        with _Weights(path, repack=repack):
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _link(word: object, directory: str) -> object:
    """Return a link in place of a path with a comma, where llama-bench would begin another file."""
    if not isinstance(word, Path) or "," not in str(word):
        return word
    link = Path(tempfile.mkdtemp(dir=directory), "model.gguf")
    link.symlink_to(word.resolve())
    return link


def benchmark(
    files: Mapping[str, Path],
    options: BenchmarkOptions,
    stock: Path | None = None,
    tools: Tools = INSTALLED,
    load: Callable[[Path, bool], float] = load_seconds,
) -> Benchmark:
    """Measure the speed of files, by the names that they have in the result, and its ratio to that of a stock file.

    `load` measures how long a file takes to load.

    Raises:
        D2QError: a file can't be read, or see run_rounds.
    """
    for path in (*files.values(), *([stock] if stock else ())):
        GGUFFile(path).check_blocks()
    plain = () if options.repack else STOCK_FORMS[AS_IT_IS]
    forms = STOCK_FORMS if options.repack else {AS_IT_IS: plain}
    runs: dict[tuple[str, str], Sequence[object]] = {(name, ""): ("-m", path, *plain) for name, path in files.items()}
    if stock:
        runs |= {("", form): ("-m", stock, *flags) for form, flags in forms.items()}
    # First, because it says why a file can't be loaded.
    loading = {name: load(path, options.repack) for name, path in files.items()}
    times = run_rounds(runs, options, tools)
    speeds = {name: median_speeds(options, times, (name, "")) for name in files}
    if stock is None:
        return Benchmark(options, speeds, None, None, loading)
    stock_speeds = [median_speeds(options, times, ("", form)) for form in forms]
    ratios = {
        name: {
            phase: min(statistics.median(seen["", form] / seen[name, ""] for seen in rounds) for form in forms)
            for phase, rounds in times.items()
        }
        for name in files
    }
    fastest = {phase: max(each[phase] for each in stock_speeds) for phase in times}
    return Benchmark(options, speeds, fastest, ratios, loading)


@contextmanager
def stock_file(like: Path, type_name: str, tools: Tools = INSTALLED) -> Iterator[Path]:
    """Make the same model in a stock type, to measure its speed; it is removed after the with block.

    It is requantized from the file itself, because speed doesn't depend on the weights: don't measure its accuracy.
    Embeddings and head keep the file's types; linear layers get the stock type where its blocks fit.

    Args:
        like: the GGUF file.
        type_name: llama-quantize's name of the type, for example "Q2_K".
        tools: where llama.cpp's tools are.

    Raises:
        D2QError: llama-quantize isn't built, or there is no such type.
    """
    tensors = GGUFFile(like).tensors
    if "token_embd.weight" not in tensors:
        raise D2QError(f"{like} has no token embeddings, so it isn't a language model; name a file to compare with")
    embedding = tensors["token_embd.weight"].type_name
    head = tensors.get("output.weight", tensors["token_embd.weight"]).type_name
    tables = ("--token-embedding-type", embedding, "--output-tensor-type", head)
    with tempfile.TemporaryDirectory() as work:
        out, imatrix = Path(work) / "stock.gguf", Path(work) / "imatrix.gguf"
        options: tuple[object, ...] = ("--allow-requantize", "--pure", *tables)
        if type_name.upper().startswith("IQ"):  # llama-quantize refuses most of these without an importance matrix
            tools.run("llama-imatrix", "-m", like, "-f", PROSE, "-o", imatrix, "-c", 128, "--chunks", 1)
            options = (*options, "--imatrix", imatrix)
        try:
            tools.run("llama-quantize", *options, like, out, type_name.upper())
        except D2QError as error:
            reason = str(error).splitlines()[-1]
            raise D2QError(f"can't make a {type_name} file of {like} to compare with: {reason}") from error
        yield out
