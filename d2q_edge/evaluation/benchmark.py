"""The speed of GGUF files on this machine, by llama-bench, in rounds.

Files take turns, so that a busy moment of the machine hits all of them alike; what counts is the median over the
rounds, and of a comparison the median of the rounds' ratios. Knows llama-bench's options and output; does not know how
the files came about.
"""

import json
import statistics
import tempfile
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from d2q_edge.calibration.text import BUILTIN
from d2q_edge.errors import D2QError
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.runtime import run_tool

PROMPT, GENERATION = "prompt", "generation"
STOCK_FORMS = {"repacked": ("--repack", 1), "as it is": ("--repack", 0)}
"""llama.cpp may rearrange a stock type's weights when it loads them, which is faster in one phase and slower in the
other; both forms are measured and the better one counts."""

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Settings:
    """What is measured: prompt length and generated tokens, numbers of threads, rounds."""

    prompt: int = 512
    generation: int = 64
    threads: tuple[int, ...] = (1, 2)
    rounds: int = 5

    def tokens(self, phase: str) -> int:
        """How many tokens a run of a phase ("prompt-1", "generation-4") goes through."""
        return self.prompt if phase.startswith(PROMPT) else self.generation


@dataclass(frozen=True)
class Benchmark:
    """Results, by phase and threads ("prompt-1").

    Attributes:
        settings: what was measured.
        speeds: tokens per second, medians over the rounds, of every file by the name it was given.
        stock: the same of the stock file; None without one.
        ratios: of every file's speed to the stock file's better form, medians over the rounds; above 1 it is faster.
    """

    settings: Settings
    speeds: dict[str, dict[str, float]]
    stock: dict[str, float] | None
    ratios: dict[str, dict[str, float]] | None

    def to_json(self) -> dict[str, Any]:
        """Plain values for json.dump: tokens per second, and ratios (above 1: faster than the stock file)."""
        return {
            "prompt": self.settings.prompt,
            "generation": self.settings.generation,
            "threads": list(self.settings.threads),
            "rounds": self.settings.rounds,
            "tokens_per_second": self.speeds,
            "stock_tokens_per_second": self.stock,
            "speed_ratios": self.ratios,
        }

    def describe(self, stock_name: str | None = None) -> str:
        """A table for people, with a column for each phase and number of threads."""
        rows = dict(self.speeds)
        if self.stock is not None:
            rows[f"{stock_name} (stock)"] = self.stock
        ratios = {f"{name} / stock": values for name, values in (self.ratios or {}).items()}
        phases = [f"{phase}-{threads}" for phase in (PROMPT, GENERATION) for threads in self.settings.threads]
        width = max(map(len, ("tokens/s", *rows, *ratios)))
        lines = [f"{'tokens/s':{width}}" + "".join(f"{phase:>15}" for phase in phases)]
        for decimals, block in ((1, rows), (2, ratios)):
            for name, row in block.items():
                lines.append(f"{name:{width}}" + "".join(f"{row[phase]:15.{decimals}f}" for phase in phases))
        return "\n".join(lines)


def run_rounds(runs: Mapping[Key, Sequence[object]], settings: Settings) -> dict[str, list[dict[Key, float]]]:
    """Run llama-bench on everything in turn.

    Args:
        runs: for each of them the options that name the file, as a path, and whatever else is its own.
        settings: see there.

    Returns:
        Seconds by phase and threads ("prompt-1"), round, and key of `runs`.

    Raises:
        D2QError: llama-bench isn't built, or can't run a file.
    """
    threads = ",".join(map(str, settings.threads))
    options = ("-p", settings.prompt, "-n", settings.generation, "-t", threads, "-r", 1, "-o", "json")
    times: dict[str, list[dict[Key, float]]] = {}
    with _without_commas(runs) as linked:
        for index in range(settings.rounds):
            for key, own in linked.items():
                for run in json.loads(run_tool("llama-bench", *own, *options)):
                    phase = f"{PROMPT if run['n_prompt'] else GENERATION}-{run['n_threads']}"
                    rounds = times.setdefault(phase, [])
                    if len(rounds) <= index:
                        rounds.append({})
                    rounds[index][key] = run["avg_ns"] / 1e9
    return times


def benchmark(files: Mapping[str, Path], settings: Settings, stock: Path | None = None) -> Benchmark:
    """Measure files, and how much faster or slower than a stock file they are.

    Args:
        files: by the names that the result has them under.
        settings: see there.
        stock: the file to compare with.

    Raises:
        D2QError: a file can't be read or run, or llama-bench isn't built.
    """
    for path in (*files.values(), *([stock] if stock else ())):
        GGUFFile(path).check_blocks()
    runs: dict[tuple[str, str], Sequence[object]] = {(name, ""): ("-m", path) for name, path in files.items()}
    if stock:
        runs |= {("", form): ("-m", stock, *options) for form, options in STOCK_FORMS.items()}
    times = run_rounds(runs, settings)

    def speeds(key: tuple[str, str]) -> dict[str, float]:
        return {
            phase: settings.tokens(phase) / statistics.median(seen[key] for seen in rounds)
            for phase, rounds in times.items()
        }

    own = {name: speeds((name, "")) for name in files}
    if stock is None:
        return Benchmark(settings, own, None, None)
    forms = [speeds(("", form)) for form in STOCK_FORMS]
    ratios = {
        name: {
            phase: min(statistics.median(seen["", form] / seen[name, ""] for seen in rounds) for form in STOCK_FORMS)
            for phase, rounds in times.items()
        }
        for name in files
    }
    return Benchmark(settings, own, {phase: max(form[phase] for form in forms) for phase in times}, ratios)


@contextmanager
def stock_file(like: Path, type_name: str) -> Iterator[Path]:
    """The same model in a stock type, for as long as the with block lasts.

    Speed does not depend on what the weights are, so that they are requantized from the file itself: good for nothing
    but this. Embeddings and head keep the file's types; the linear layers get the named one, where its blocks fit.

    Args:
        like: the GGUF file.
        type_name: as llama-quantize calls it, for example "Q2_K".

    Raises:
        D2QError: llama-quantize isn't built, or there is no such type.
    """
    tensors = GGUFFile(like).tensors
    if "token_embd.weight" not in tensors:
        raise D2QError(f"{like} has no token embeddings, so that it isn't a language model; name one to compare with")
    embedding = tensors["token_embd.weight"].type_name
    head = tensors.get("output.weight", tensors["token_embd.weight"]).type_name
    tables = ("--token-embedding-type", embedding, "--output-tensor-type", head)
    with tempfile.TemporaryDirectory() as work:
        out, imatrix = Path(work) / "stock.gguf", Path(work) / "imatrix.gguf"
        weights: tuple[object, ...] = ()
        if type_name.upper().startswith("IQ"):
            # llama-quantize refuses most of these without one.
            text = BUILTIN["calibration"]
            run_tool("llama-imatrix", "-m", like, "-f", text, "-o", imatrix, "-c", 128, "--chunks", 1)
            weights = ("--imatrix", imatrix)
        try:
            run_tool("llama-quantize", "--allow-requantize", "--pure", *weights, *tables, like, out, type_name.upper())
        except D2QError as error:
            reason = str(error).splitlines()[-1]
            raise D2QError(f"can't make a {type_name} file of {like} to compare with: {reason}") from error
        yield out


@contextmanager
def _without_commas(runs: Mapping[Key, Sequence[object]]) -> Iterator[dict[Key, Sequence[object]]]:
    """The same options with links in place of paths that have a comma, where llama-bench would begin another file."""
    with tempfile.TemporaryDirectory() as work:

        def plain(word: object) -> object:
            if not isinstance(word, Path) or "," not in str(word):
                return word
            if "," in work:
                raise D2QError(
                    f"llama-bench takes the comma in {word} for the end of a path; rename it, or set TMPDIR to a "
                    "directory without a comma in its path"
                )
            link = Path(tempfile.mkdtemp(dir=work)) / word.name.replace(",", "_")
            link.symlink_to(word.resolve())
            return link

        yield {key: [plain(word) for word in own] for key, own in runs.items()}
