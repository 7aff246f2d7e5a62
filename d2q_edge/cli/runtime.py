"""Parse and run `d2q-edge runtime install` and `d2q-edge runtime info`."""

import json
from pathlib import Path

import click

from d2q_edge.cli.common import PATH, json_option


@click.group("runtime")
def command() -> None:
    """Install or describe the patched llama-cpp-python that runs the files."""


@command.command()
@click.option("--tools", is_flag=True, help="Also build llama-quantize, llama-imatrix, llama-perplexity, llama-bench.")
@click.option("--server", is_flag=True, help="Also build llama-server, which `d2q-edge serve` runs.")
@click.option("--page/--no-page", default=True, help="With its web page, where npm is there to build it.")
@click.option("--sdist", type=PATH, metavar="FILE", help="llama-cpp-python's sources, instead of a download.")
def install(tools: bool, server: bool, page: bool, sdist: Path | None) -> None:
    """Build the patched llama-cpp-python (once per machine) and install it."""
    from d2q_edge import runtime

    runtime.install(tools, server, page=page, sdist=sdist)
    click.echo(runtime.info().version)


@command.command()
@json_option
def info(as_json: bool) -> None:
    """Show what is installed."""
    from d2q_edge import runtime

    values = runtime.info().to_json()
    if as_json:
        click.echo(json.dumps(values))
        return
    for name, value in values.items():
        click.echo(f"{name:12} {value if value else 'none'}")
