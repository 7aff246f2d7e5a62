"""Parse and run `d2q-edge run`."""

from pathlib import Path
from typing import Any

import click

from d2q_edge.cli.common import PATH, Number, loading_options, sampling_options, take, threads_option
from d2q_edge.options import LoadOptions, SamplingOptions


@click.command("run")
@click.argument("file", type=PATH)
@click.option("-p", "--prompt", required=True, help="Text to continue.")
@click.option("-n", "--tokens", type=click.IntRange(1), default=128, help="Tokens to generate at most.")
@click.option("--context", type=click.IntRange(64), help="Tokens of prompt and text.  [default: as many as needed]")
@click.option("--temperature", type=Number(0), default=0.8, help="0 picks the most likely token.")
@sampling_options
@click.option("--seed", type=click.IntRange(0), default=0, help="Seed of the sampling.")
@loading_options
@threads_option
def command(
    file: Path,
    prompt: str,
    tokens: int,
    context: int | None,
    temperature: float,
    seed: int,
    threads: int | None,
    **options: Any,
) -> None:
    """Continue a prompt with a GGUF FILE.

    Prints the prompt and its continuation, until the model ends the text or --tokens are reached. No chat template is
    applied: `d2q-edge chat` does that.
    """
    from d2q_edge.runtime.generate import generate

    more: dict[str, Any] = {"sampling": take(SamplingOptions, options), "loading": take(LoadOptions, options)}
    pieces = generate(file, prompt, tokens, temperature, seed, threads, context=context, **more)
    click.echo(prompt, nl=False)
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()
