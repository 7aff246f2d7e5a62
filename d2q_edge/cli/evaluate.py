"""Parse and run `d2q-edge eval`."""

from pathlib import Path

import click

from d2q_edge.cli.common import LORA, PATH, field_option, json_option, print_result, wait_passively
from d2q_edge.options import MIN_CONTEXT, ComparisonOptions, LoadOptions


@click.command("eval")
@click.argument("file", type=PATH)
@click.option("--reference", type=PATH, help="GGUF of the original model; adds KL divergence and top-1 agreement.")
@field_option(ComparisonOptions, "text", help="Text, or .jsonl of conversations, to measure on.")
@click.option("--chunks", type=click.IntRange(1), help="Chunks to measure at most.  [default: all]")
@field_option(ComparisonOptions, "context", type=click.IntRange(MIN_CONTEXT), help="Tokens per chunk.")
@field_option(LoadOptions, "lora", **LORA, help="Adapters to use FILE with.")
@click.option("--reference-lora", **LORA, help="Adapters to use the reference with.")
@field_option(LoadOptions, "repack", help="Let llama.cpp rearrange weights for speed.")
@json_option
def command(
    file: Path,
    reference: Path | None,
    text: str,
    chunks: int | None,
    context: int,
    lora: tuple[str, ...],
    reference_lora: tuple[str, ...],
    repack: bool,
    as_json: bool,
) -> None:
    """Measure a GGUF FILE's perplexity, and its distance from a reference.

    The protocol is that of llama-perplexity.
    """
    if reference_lora and reference is None:
        raise click.UsageError("--reference-lora needs --reference")
    wait_passively()
    from d2q_edge.evaluation.perplexity import evaluate

    loading = LoadOptions(lora=lora, repack=repack)
    result = evaluate(file, reference, text, chunks, context, loading=loading, reference_lora=reference_lora)
    print_result(result, as_json)
