"""`d2q-edge runtime` with its two commands."""

import json

import click


@click.group("runtime")
def command() -> None:
    """The patched llama-cpp-python that runs the files."""


@command.command()
@click.option("--tools", is_flag=True, help="Also build llama-quantize, llama-imatrix, llama-perplexity, llama-bench.")
def install(tools: bool) -> None:
    """Build the patched llama-cpp-python, once per machine, and install it in this environment."""
    from d2q_edge import runtime as patched

    patched.install(tools=tools)
    click.echo(patched.info().version)


@command.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(as_json: bool) -> None:
    """What is installed."""
    from d2q_edge import runtime as patched

    facts = patched.info().to_json()
    if as_json:
        click.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        click.echo(f"{name:12} {value if value else 'none'}")
