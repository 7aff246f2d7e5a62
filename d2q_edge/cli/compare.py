"""Parse and run `d2q-edge compare`."""

from functools import partial
from pathlib import Path
from typing import Any

import click

from d2q_edge.cli.common import PATH, field_option, json_option, print_result, threads_option, wait_passively
from d2q_edge.options import MIN_CONTEXT, ComparisonOptions

option = partial(field_option, ComparisonOptions)


@click.command("compare")
@click.argument("reference", metavar="REF", type=PATH)
@click.argument("files", metavar="[FILE]...", type=PATH, nargs=-1)
@click.option(
    "--with-stock", metavar="TYPES", default="", show_default=False, help="Stock types to compare with: Q2_K,IQ2_XS,..."
)
@option("pure", help="Use the stock type for every matrix of the blocks, q8_0 for the tables.")
@click.option("--keep-stock", type=PATH, metavar="DIR", help="Keep the stock files in DIR.  [default: remove them]")
@option("calibration", multiple=True, metavar="FILE", help="Texts of their importance matrix, as for convert.")
@option("text", help="Text, or .jsonl of conversations, to measure on.")
@option("chunks", type=click.IntRange(1), help="Chunks to measure at most.")
@option("context", type=click.IntRange(MIN_CONTEXT), help="Tokens per chunk.")
@option("speed", help="Also measure tokens per second.")
@threads_option
@option("rounds", type=click.IntRange(1), help="Speed is their median.")
@click.option("--report", "reports", type=PATH, multiple=True, help="convert's report on a FILE.  [default: FILE.json]")
@click.option("-o", "--output", "outputs", type=PATH, multiple=True, help="Report (.html) or picture (.png, .svg).")
@json_option
def command(
    reference: Path,
    files: tuple[Path, ...],
    with_stock: str,
    keep_stock: Path | None,
    reports: tuple[Path, ...],
    outputs: tuple[Path, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Compare size, KL divergence and speed of GGUF FILEs of one model.

    REF is the original model, a GGUF of f16 or bf16.

    Stock files are made with an importance matrix by llama.cpp's own tools: `d2q-edge runtime install --tools`.
    """
    wait_passively()
    from d2q_edge.evaluation.compare import compare
    from d2q_edge.evaluation.report.page import check_target, write
    from d2q_edge.evaluation.stock import parse_types

    for output in outputs:
        check_target(output)
    options["stock"] = parse_types(with_stock)
    result = compare(reference, files, ComparisonOptions(**options), keep_stock=keep_stock, reports=reports)
    # First, so that an output that can't be written doesn't lose an hour's numbers.
    print_result(result, as_json)
    for output in outputs:
        write(result, output)
