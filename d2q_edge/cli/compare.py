"""`d2q-edge compare`."""

import json
from pathlib import Path

import click

from d2q_edge.cli.common import PATH, THREADS, wait_passively


@click.command("compare")
@click.argument("reference", metavar="REF", type=PATH)
@click.argument("files", metavar="[FILE]...", type=PATH, nargs=-1)
@click.option("--with-stock", metavar="TYPES", default="", help="Also compare with stock types: Q2_K,IQ2_XS,...")
@click.option("--pure", is_flag=True, help="In stock files every matrix in that type; embeddings and head in q8_0.")
@click.option("--keep-stock", type=PATH, metavar="DIR", help="Keep the stock files there.  [default: remove them]")
@click.option("--calibration", default="builtin", show_default=True, help="Text of their importance matrix.")
@click.option("--text", default="builtin", show_default=True, help="Text file to measure on.")
@click.option("--chunks", type=click.IntRange(1), default=50, show_default=True, help="At most that many.")
@click.option("--context", type=click.IntRange(8), default=512, show_default=True, help="Tokens per chunk.")
@click.option("--speed/--no-speed", default=True, show_default=True, help="Measure tokens per second, too.")
@click.option("--threads", type=THREADS, help="For the speed.  [default: one for each CPU]")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Of the speed; the median counts.")
@click.option("--report", "reports", type=PATH, multiple=True, help="Of convert, about a FILE.  [default: FILE.json]")
@click.option(
    "-o", "--output", "outputs", type=PATH, multiple=True, help="Write a report (.html) or picture (.png, .svg)."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    reference: Path,
    files: tuple[Path, ...],
    with_stock: str,
    pure: bool,
    keep_stock: Path | None,
    calibration: str,
    text: str,
    chunks: int,
    context: int,
    speed: bool,
    threads: int | None,
    rounds: int,
    reports: tuple[Path, ...],
    outputs: tuple[Path, ...],
    as_json: bool,
) -> None:
    """GGUF FILEs of one model side by side: size, distance from the original REF (a GGUF of f16 or bf16), and speed.

    Stock files are made with an importance matrix by llama.cpp's own tools: `d2q-edge runtime install --tools`.
    """
    wait_passively()
    from d2q_edge.evaluation.compare import compare
    from d2q_edge.evaluation.comparison import Settings
    from d2q_edge.evaluation.report.page import check_target, write
    from d2q_edge.evaluation.stock import parse_types

    for output in outputs:
        check_target(output)
    settings = Settings(
        text=text,
        chunks=chunks,
        context=context,
        stock=parse_types(with_stock),
        pure=pure,
        calibration=calibration,
        speed=speed,
        threads=threads,
        rounds=rounds,
    )
    result = compare(reference, files, settings, keep_stock=keep_stock, reports=reports)
    # First, because it took long: whatever is wrong with an output, the numbers aren't lost.
    click.echo(json.dumps(result.to_json()) if as_json else result.describe())
    for output in outputs:
        write(result, output)
