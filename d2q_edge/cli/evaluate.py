"""`d2q-edge eval`."""

import json
from pathlib import Path

import click

from d2q_edge.cli.common import PATH, wait_passively


@click.command("eval")
@click.argument("file", type=PATH)
@click.option("--reference", type=PATH, help="GGUF of the original model; adds KL divergence and top-1 agreement.")
@click.option("--text", default="builtin", show_default=True, help="Text file to measure on.")
@click.option("--chunks", type=click.IntRange(1), help="Measure at most that many chunks.  [default: all]")
@click.option("--context", type=click.IntRange(8), default=512, show_default=True, help="Tokens per chunk.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(file: Path, reference: Path | None, text: str, chunks: int | None, context: int, as_json: bool) -> None:
    """Perplexity of a GGUF FILE, and its distance from a reference, as llama-perplexity measures them."""
    wait_passively()
    from d2q_edge.evaluation.perplexity import evaluate

    result = evaluate(file, reference, text, chunks, context)
    click.echo(json.dumps(result.to_json()) if as_json else result.describe())
