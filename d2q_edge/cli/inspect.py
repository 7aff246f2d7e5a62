"""Parse and run `d2q-edge inspect`."""

import json
from pathlib import Path

import click

from d2q_edge.cli.common import PATH, json_option


@click.command("inspect")
@click.argument("file", type=PATH)
@json_option
def command(file: Path, as_json: bool) -> None:
    """Show tensor types, sizes and recipe of a GGUF FILE, and whether it runs here."""
    from d2q_edge.export import inspection

    found = inspection.inspect(file)
    click.echo(json.dumps(found) if as_json else inspection.describe(found))
