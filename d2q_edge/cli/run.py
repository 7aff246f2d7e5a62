"""Parse and run `d2q-edge run`."""

from pathlib import Path

import click

from d2q_edge.cli.common import PATH, Number, threads_option


@click.command("run")
@click.argument("file", type=PATH)
@click.option("-p", "--prompt", required=True, help="Text to continue.")
@click.option("-n", "--tokens", type=click.IntRange(1), default=128, help="Tokens to generate at most.")
@click.option("--temperature", type=Number(0), default=0.8, help="0 picks the most likely token.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Seed of the sampling.")
@threads_option
def command(file: Path, prompt: str, tokens: int, temperature: float, seed: int, threads: int | None) -> None:
    """Continue a prompt with a GGUF FILE.

    Prints the prompt and its continuation, until the model ends the text or --tokens are reached. No chat template is
    applied: `d2q-edge chat` does that.
    """
    from d2q_edge.runtime.generate import generate

    pieces = generate(file, prompt, tokens, temperature, seed, threads)
    click.echo(prompt, nl=False)
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()
