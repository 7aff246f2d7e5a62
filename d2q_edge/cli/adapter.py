"""Parse and run `d2q-edge adapter`."""

from pathlib import Path

import click

from d2q_edge.cli.common import PATH


@click.command("adapter")
@click.argument("source", metavar="IN")
@click.argument("output", metavar="OUT", type=PATH)
@click.option("--for", "file", type=PATH, required=True, help="The GGUF file that it is to be used with.")
@click.option("--force", is_flag=True, help="Replace an existing OUT.")
def command(source: str, output: Path, file: Path, force: bool) -> None:
    """Rewrite a LoRA adapter for a GGUF file of ours.

    IN was made for the original model: a PEFT adapter's directory or Hugging Face id, or a GGUF file. OUT is the GGUF
    file that has the same effect on the file's scaled columns, for --lora of `run`, `chat`, `serve` and `eval`.
    """
    from d2q_edge.export.adapter import rewrite_adapter

    size = rewrite_adapter(source, file, output, force=force)
    click.echo(f"{output}: {size:,} bytes")
