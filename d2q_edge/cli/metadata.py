"""Parse and run `d2q-edge metadata`."""

import json
from pathlib import Path

import click

from d2q_edge.cli.common import PATH, json_option


def _parse_changes(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Split KEY=VALUE."""
    changes: dict[str, str] = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not key or not equals:
            raise click.BadParameter(f"{value!r} isn't KEY=VALUE")
        if key in changes:
            raise click.BadParameter(f"{key} is set twice")
        changes[key] = text
    return changes


@click.command("metadata")
@click.argument("file", type=PATH)
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="KEY[:TYPE]=VALUE",
    callback=_parse_changes,
    help="Set a key; its value keeps its type. TYPE (uint32, float32, bool, string, ...) is for new keys.",
)
@click.option("--chat-template", type=PATH, help="File with a new chat template.")
@click.option("--remove", "removals", multiple=True, metavar="KEY", help="Remove a key.")
@click.option("-o", "--output", type=PATH, help="The file to write.  [default: FILE itself]")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@json_option
def command(
    file: Path,
    changes: dict[str, str],
    chat_template: Path | None,
    removals: tuple[str, ...],
    output: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Show the keys of a GGUF FILE, ours or a stock one, or change them.

    Tensors stay as they are. Keys that the tensors or the vocabulary depend on can't be changed.
    """
    from d2q_edge.export import metadata_edit
    from d2q_edge.formats.gguf_reader import GGUFFile
    from d2q_edge.runtime.chat import TEMPLATE_KEY

    if chat_template is not None:
        if TEMPLATE_KEY in changes:
            raise click.UsageError(f"--chat-template and --set {TEMPLATE_KEY} exclude each other")
        changes[TEMPLATE_KEY] = metadata_edit.read_template(chat_template)
    if changes or removals:
        if as_json:
            raise click.UsageError("--json is for showing keys; it can't be used with changes")
        size = metadata_edit.edit(file, changes, removals, output, force=force)
        click.echo(f"{output or file}: {size:,} bytes")
        return
    if output is not None or force:
        raise click.UsageError("-o and --force need something to change: --set, --chat-template or --remove")
    found = GGUFFile(file)
    click.echo(json.dumps(found.kv) if as_json else metadata_edit.describe(found))
