"""Compare several GGUF files of one model: accuracy, size and speed."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from d2q_edge.calibration.text import load_evaluation
from d2q_edge.errors import D2QError, printable
from d2q_edge.evaluation import benchmark
from d2q_edge.evaluation.comparison import GIVEN, REFERENCE, STOCK, Comparison, Row
from d2q_edge.evaluation.reference import reference
from d2q_edge.evaluation.stock import StockQuantizer
from d2q_edge.export.conversion_report import find_report
from d2q_edge.export.inspection import allocation
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.options import BenchmarkOptions, ComparisonOptions
from d2q_edge.runtime import source
from d2q_edge.runtime.tools import INSTALLED, Tools
from d2q_edge.utils.files import scratch_directory
from d2q_edge.utils.machine import usable_cpus


def compare(
    original: Path,
    files: Sequence[Path],
    options: ComparisonOptions,
    *,
    keep_stock: Path | None = None,
    reports: Sequence[Path] = (),
    scratch: Path | None = None,
    tools: Tools = INSTALLED,
) -> Comparison:
    """Measure files against the original model that they were made from.

    Stock files are made first; the original model runs once over the text; every file is measured against it; then all
    of them take turns in llama-bench.

    Args:
        original: its GGUF file, usually in F16 or BF16.
        files: what to compare.
        options: what to measure.
        keep_stock: where stock files are kept, and reused from; None makes them in `scratch` and removes them.
        reports: files that `convert --report` wrote; that of FILE is also looked for in FILE.json.
        scratch: for large temporary files; None takes the cache, because the system's directory may be in memory.
        tools: where llama.cpp's tools are.

    Raises:
        D2QError: a file can't be read or run or is a different model, the text is too short, a tool isn't built, or
            the disk is too full.
    """
    if not files and not options.stock:
        raise D2QError("there is nothing to compare with the reference; name files, or types with --with-stock")
    if any(path.resolve() == original.resolve() for path in files):
        raise D2QError(f"{original} is the reference, and it is among the files to compare with it; leave it out there")
    text = load_evaluation(options.text)
    opened = {path: GGUFFile(path) for path in (original, *files)}
    conversions = {path: find_report(path, opened[path], reports) for path in files}
    for tool in ("llama-imatrix", "llama-quantize") if options.stock else ():
        tools.find(tool)
    names = short_names([original, *files])
    threads = options.threads or usable_cpus()
    rows: dict[Path, Row] = {}
    with scratch_directory(scratch or source.cache_directory().parent, "compare-", "set XDG_CACHE_HOME") as work:
        stock: dict[str, Path] = {}
        if options.stock:
            quantizer = StockQuantizer(original, options.calibration, options.pure, tools)
            stock = quantizer.files(options.stock, keep_stock or work)
        with reference(original, text, options.chunks, options.context, work) as base:
            rows[original] = Row(names[original], REFERENCE, base.evaluation)
            for path in files:
                layers = allocation(opened[path])
                rows[path] = Row(names[path], GIVEN, base.evaluate(path), {}, layers, conversions[path])
            for type_name, path in stock.items():
                rows[path] = Row(type_name, STOCK, base.evaluate(path), {}, allocation(GGUFFile(path)))
        speeds = _speeds(list(rows), options, threads, tools)
    finished = [replace(row, speeds=speeds.get(path, {})) for path, row in rows.items()]
    finished.sort(key=lambda row: (row.kind != REFERENCE, -row.evaluation.bytes))
    model = printable(str(opened[original].kv.get("general.name") or original.stem))
    return Comparison(model, finished, options, threads)


def short_names(paths: Sequence[Path]) -> dict[Path, str]:
    """Return distinct printable names for files: without the directory where that is enough."""
    stems = [path.name.removesuffix(".gguf") for path in paths]
    return {path: printable(s if stems.count(s) == 1 else str(path)) for path, s in zip(paths, stems, strict=True)}


def _speeds(
    paths: Sequence[Path], options: ComparisonOptions, threads: int, tools: Tools
) -> dict[Path, dict[str, float]]:
    """Measure every file's tokens per second, by phase."""
    if not options.speed:
        return {}
    try:
        tools.find("llama-bench")
    except D2QError as error:
        print(f"no speeds: {error}", file=sys.stderr)
        return {}
    own = BenchmarkOptions(options.prompt, options.generation, (threads,), options.rounds)
    times = benchmark.run_rounds({path: ("-m", path) for path in paths}, own, tools)
    return {
        path: {phase.split("-")[0]: speed for phase, speed in benchmark.median_speeds(own, times, path).items()}
        for path in paths
    }
