"""Several files of one model side by side: how near they are to the original, how large, how fast.

Knows the order of the work: stock files are made (stock.py), the original runs once over the text (reference.py), every
file is measured against it, and all of them take turns in llama-bench (benchmark.py). What people see of it is in
report/.
"""

import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from d2q_edge import runtime
from d2q_edge.calibration.text import load_text
from d2q_edge.errors import D2QError, printable
from d2q_edge.evaluation.benchmark import GENERATION, PROMPT, run_rounds
from d2q_edge.evaluation.benchmark import Settings as Rounds
from d2q_edge.evaluation.perplexity import Evaluation
from d2q_edge.evaluation.reference import reference
from d2q_edge.evaluation.stock import stock_files
from d2q_edge.export.conversion_report import find_report
from d2q_edge.export.inspection import allocation
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.runtime import source
from d2q_edge.utils.files import scratch_directory
from d2q_edge.utils.machine import usable_cpus

REFERENCE, GIVEN, STOCK = "reference", "file", "stock"
"""What a row is."""
SAME_SIZE = 1.005
"""Files whose sizes differ by less than this factor are as large as each other."""


@dataclass(frozen=True)
class Settings:
    """What is measured, and how.

    Attributes:
        text: to measure on: a text file, or "builtin".
        chunks: of it, at most.
        context: tokens per chunk.
        stock: types to make files of.
        pure: every matrix of a stock file in its type, see stock.py.
        calibration: text for the stock files' importance matrix.
        speed: also measure tokens per second.
        threads: for that; None takes all that this process may use.
        prompt, generation, rounds: for that, see benchmark.py.
    """

    text: str = "builtin"
    chunks: int | None = 50
    context: int = 512
    stock: tuple[str, ...] = ()
    pure: bool = False
    calibration: str = "builtin"
    speed: bool = True
    threads: int | None = None
    prompt: int = 256
    generation: int = 64
    rounds: int = 3


@dataclass(frozen=True)
class Row:
    """One file.

    Attributes:
        name: how the table calls it.
        kind: REFERENCE, GIVEN or STOCK.
        evaluation: without KL divergence for the reference.
        speeds: tokens per second by phase, "prompt" and "generation"; empty where they weren't measured.
        allocation: types of its blocks' matrices, see inspection.py.
        conversion: what `convert --report` wrote about it, if that was found.
    """

    name: str
    kind: str
    evaluation: Evaluation
    speeds: Mapping[str, float] = field(default_factory=dict)
    allocation: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    conversion: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Comparison:
    """The result: rows from the largest file to the smallest, the reference first.

    Attributes:
        model: the model's name, from the reference.
        rows: see there.
        settings: see there.
        threads: that speeds were measured with.
        text: the name of the text, and of the calibration text.
    """

    model: str
    rows: Sequence[Row]
    settings: Settings
    threads: int

    def to_json(self) -> dict[str, Any]:
        """Plain values for json.dump."""
        return {
            "model": self.model,
            "settings": {**asdict(self.settings), "threads": self.threads},
            "files": [
                {
                    "name": row.name,
                    "kind": row.kind,
                    **row.evaluation.to_json(),
                    "tokens_per_second": dict(row.speeds),
                    "best_at_its_size": row in self.best(),
                }
                for row in self.rows
            ],
        }

    def best(self) -> list[Row]:
        """The rows that no other row beats: none is as small and at least as near to the reference."""
        compared = [row for row in self.rows if row.evaluation.kl_divergence_mean is not None]
        return [row for row in compared if not any(_beats(other, row) for other in compared)]

    def describe(self) -> str:
        """The table for the terminal."""
        best = self.best()
        width = max(12, *(len(row.name) + 2 for row in self.rows))
        lines = [
            f"{'file':{width}}{'size':>10}{'bits/w':>8}{'perplexity':>12}{'KL divergence':>18}{'99 %':>8}"
            f"{'top-1':>8}{'prompt t/s':>12}{'gen. t/s':>10}"
        ]
        for row in self.rows:
            e = row.evaluation
            divergence = "-"
            if e.kl_divergence_mean is not None:
                divergence = f"{e.kl_divergence_mean:.4f} ± {e.kl_divergence_stderr:.4f}"
            p99 = "-" if e.kl_divergence_p99 is None else f"{e.kl_divergence_p99:.3f}"
            agreement = "-" if e.top1_agreement is None else f"{e.top1_agreement:.1%}"
            speeds = (f"{row.speeds[phase]:.1f}" if phase in row.speeds else "-" for phase in (PROMPT, GENERATION))
            lines.append(
                f"{row.name + (' *' if row in best else ''):{width}}{size_text(e.bytes):>10}{e.bits_per_weight:8.3f}"
                f"{e.perplexity:12.3f}{divergence:>18}{p99:>8}{agreement:>8}"
                + "".join(f"{speed:>{columns}}" for speed, columns in zip(speeds, (12, 10), strict=True))
            )
        lines.append("* no other file is as small and as near to the original")
        return "\n".join(lines)


def compare(
    original: Path,
    files: Sequence[Path],
    settings: Settings = Settings(),
    *,
    keep_stock: Path | None = None,
    reports: Sequence[Path] = (),
) -> Comparison:
    """Measure files against the original that they were made of.

    Args:
        original: its GGUF file, usually of f16 or bf16.
        files: what to compare.
        settings: see there.
        keep_stock: a directory where stock files stay, and are taken from if they are there; otherwise they are made
            in the cache directory and removed.
        reports: what `convert --report` wrote; that of FILE is also looked for beside it, as FILE.json.

    Raises:
        D2QError: a file can't be read or run or is of another model, the text is too short, a tool isn't built, or
            there is no room.
    """
    if not files and not settings.stock:
        raise D2QError("there is nothing to compare with the reference; name files, or types with --with-stock")
    if any(path.resolve() == original.resolve() for path in files):
        raise D2QError(f"{original} is the reference, and it is among the files to compare with it; leave it out there")
    text = load_text(settings.text, "evaluation")
    opened = {path: GGUFFile(path) for path in (original, *files)}
    conversions = {path: find_report(path, opened[path], reports) for path in files}
    for tool in ("llama-imatrix", "llama-quantize") if settings.stock else ():
        runtime.find_tool(tool)
    names = _names([original, *files])
    rows: dict[Path, Row] = {}
    with _room() as room:
        stock: dict[str, Path] = {}
        if settings.stock:
            place = keep_stock or room
            stock = stock_files(original, settings.stock, place, settings.calibration, pure=settings.pure)
        with reference(original, text, settings.chunks, settings.context, room) as base:
            rows[original] = Row(names[original], REFERENCE, base.evaluation)
            for path in files:
                evaluation, layers = base.evaluate(path), allocation(opened[path])
                rows[path] = Row(names[path], GIVEN, evaluation, {}, layers, conversions[path])
            for type_name, path in stock.items():
                rows[path] = Row(type_name, STOCK, base.evaluate(path), {}, allocation(GGUFFile(path)))
        threads = settings.threads or usable_cpus()
        speeds = _speeds(list(rows), settings, threads)
    finished = [
        Row(row.name, row.kind, row.evaluation, speeds.get(path, {}), row.allocation, row.conversion)
        for path, row in rows.items()
    ]
    finished.sort(key=lambda row: (row.kind != REFERENCE, -row.evaluation.bytes))
    model = printable(str(opened[original].kv.get("general.name") or original.stem))
    return Comparison(model, finished, settings, threads)


def size_text(count: int) -> str:
    """A number of bytes for people."""
    unit, name = (10**9, "GB") if count >= 10**9 else (10**6, "MB") if count >= 10**6 else (10**3, "kB")
    return f"{count / unit:.4g} {name}"


def _beats(one: Row, other: Row) -> bool:
    a, b = one.evaluation, other.evaluation
    if a.kl_divergence_mean is None or b.kl_divergence_mean is None:
        return False
    nearer, as_near = a.kl_divergence_mean < b.kl_divergence_mean, a.kl_divergence_mean == b.kl_divergence_mean
    return (nearer and a.bytes <= SAME_SIZE * b.bytes) or (as_near and SAME_SIZE * a.bytes < b.bytes)


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """Short names that differ: without the directory where that is enough.

    Names of files can hold bytes that are no text, which could neither be printed nor drawn.
    """
    stems = [path.name.removesuffix(".gguf") for path in paths]
    return {
        path: printable(stem if stems.count(stem) == 1 else str(path)) for path, stem in zip(paths, stems, strict=True)
    }


def _speeds(paths: Sequence[Path], settings: Settings, threads: int) -> dict[Path, dict[str, float]]:
    """Tokens per second of every file by phase: medians of rounds in which the files take turns."""
    if not settings.speed:
        return {}
    try:
        runtime.find_tool("llama-bench")
    except D2QError as error:
        print(f"no speeds: {error}", file=sys.stderr)
        return {}
    one = Rounds(settings.prompt, settings.generation, (threads,), 1)
    seen: dict[Path, dict[str, list[float]]] = {path: {PROMPT: [], GENERATION: []} for path in paths}
    with tqdm(total=settings.rounds * len(paths), desc="Measuring speed", unit="run", disable=None) as progress:
        for _ in range(settings.rounds):
            for path in paths:
                for phase, rounds in run_rounds({path: ("-m", path)}, one).items():
                    seen[path][phase.split("-")[0]].append(one.tokens(phase) / rounds[0][path])
                progress.update()
    return {path: {phase: statistics.median(found) for phase, found in phases.items()} for path, phases in seen.items()}


def _room() -> AbstractContextManager[Path]:
    """A directory for what is large and is not kept; not the system's, which may be in memory."""
    return scratch_directory(source.cache_directory().parent, "compare-", "set XDG_CACHE_HOME")
