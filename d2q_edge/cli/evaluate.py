"""Parse and run `d2q-edge eval`."""

from pathlib import Path

import click

from d2q_edge.cli.common import PATH, field_option, json_option, print_result, wait_passively
from d2q_edge.options import MIN_CONTEXT, ComparisonOptions


@click.command("eval")
@click.argument("file", type=PATH)
@click.option("--reference", type=PATH, help="GGUF of the original model; adds KL divergence and top-1 agreement.")
@field_option(ComparisonOptions, "text", help="Text, or .jsonl of conversations, to measure on.")
@click.option("--chunks", type=click.IntRange(1), help="Chunks to measure at most.  [default: all]")
@field_option(ComparisonOptions, "context", type=click.IntRange(MIN_CONTEXT), help="Tokens per chunk.")
@json_option
def command(file: Path, reference: Path | None, text: str, chunks: int | None, context: int, as_json: bool) -> None:
    """Measure a GGUF FILE's perplexity, and its distance from a reference.

    The protocol is that of llama-perplexity.
    """
    wait_passively()
    from d2q_edge.evaluation.perplexity import evaluate

    print_result(evaluate(file, reference, text, chunks, context), as_json)
