"""Parse and run `d2q-edge bench`."""

import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import click

from d2q_edge.cli.common import MAX_THREADS, PATH, field_option, json_option
from d2q_edge.options import BenchmarkOptions


def _parse_threads(_context: click.Context, _option: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Parse numbers of threads, separated by commas, without repetitions."""
    if value is None:
        return None
    words = value.split(",")
    if not all(word.isdecimal() and 1 <= int(word) <= MAX_THREADS for word in words):
        one = f"a number of threads from 1 to {MAX_THREADS}"
        raise click.BadParameter(f"{value!r} isn't {one}, or several separated by commas")
    return tuple(dict.fromkeys(map(int, words)))


option = partial(field_option, BenchmarkOptions)


@click.command("bench")
@click.argument("files", metavar="FILE...", type=PATH, nargs=-1, required=True)
@click.option("--threads", metavar="N,N,...", callback=_parse_threads, help="CPU threads.  [default: one for each CPU]")
@click.option("--stock", help="File to compare with, or a type like Q2_K to make of FILE.")
@option("prompt", type=click.IntRange(1), help="Tokens in the prompt.")
@option("generation", type=click.IntRange(1), help="Tokens to generate.")
@option("rounds", type=click.IntRange(1), help="Results are their median.")
@option("repack", help="Let llama.cpp rearrange weights for speed.")
@json_option
def command(
    files: tuple[Path, ...], threads: tuple[int, ...] | None, stock: str | None, as_json: bool, **numbers: Any
) -> None:
    """Measure how fast GGUF FILEs process a prompt and generate text here.

    Prints tokens per second, medians of rounds in which the files take turns. With --stock, ratios of speeds follow:
    above 1, FILE is faster. Needs llama.cpp's tools: `d2q-edge runtime install --tools`.
    """
    from d2q_edge.evaluation.benchmark import benchmark, stock_file
    from d2q_edge.utils.machine import usable_cpus

    options = BenchmarkOptions(threads=threads or (usable_cpus(),), **numbers)
    with ExitStack() as stack:
        other = None
        if stock is not None:
            is_file = Path(stock).is_file() or stock.endswith(".gguf")
            other = Path(stock) if is_file else stack.enter_context(stock_file(files[0], stock))
        result = benchmark({str(path): path for path in files}, options, other)
    click.echo(json.dumps(result.to_json()) if as_json else result.describe(stock))
