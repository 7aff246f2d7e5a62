"""`d2q-edge inspect`."""

import json
from pathlib import Path

import click

from d2q_edge.cli.common import PATH


@click.command("inspect")
@click.argument("file", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(file: Path, as_json: bool) -> None:
    """What a GGUF FILE holds: tensor types, sizes, recipe, norm biases; and whether it can be run here."""
    from d2q_edge.export import inspection

    facts = inspection.inspect(file)
    click.echo(json.dumps(facts) if as_json else inspection.describe(facts))
