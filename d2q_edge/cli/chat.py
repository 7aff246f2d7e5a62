"""`d2q-edge chat`: the terminal's side of a conversation."""

import contextlib
import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from d2q_edge.cli.common import PATH, THREADS, Number
from d2q_edge.errors import D2QError

if TYPE_CHECKING:
    from d2q_edge.runtime.chat import Conversation

HELP = """\
/help   this list
/reset  forget the conversation
/exit   end (as Ctrl-D does)
Ctrl-C stops an answer."""


@click.command("chat")
@click.argument("file", type=PATH)
@click.option("--system", help="A system message: who the model is to be.")
@click.option(
    "--context", type=click.IntRange(64), default=4096, show_default=True, help="Tokens of the whole conversation."
)
@click.option("-n", "--tokens", type=click.IntRange(1), help="Of one answer at most.  [default: what the context has]")
@click.option("--temperature", type=Number(0), default=0.7, show_default=True)
@click.option("--seed", type=click.IntRange(0), help="For the same answers again.  [default: others every time]")
@click.option("--threads", type=THREADS, help="[default: one for each CPU]")
def command(
    file: Path,
    system: str | None,
    context: int,
    tokens: int | None,
    temperature: float,
    seed: int | None,
    threads: int | None,
) -> None:
    """Talk to a GGUF FILE that has a chat template.

    Ctrl-C stops an answer, Ctrl-D ends; /help lists what else can be typed. When the input isn't a terminal, every
    line of it is a message, and only the answers are printed to stdout.
    """
    from d2q_edge.runtime.chat import Conversation

    with Conversation(
        file,
        system=system,
        context=context,
        max_tokens=tokens,
        temperature=temperature,
        seed=seed,
        threads=threads,
    ) as conversation:
        click.echo(f"{file}, a context of {conversation.context} tokens. /help lists the commands.", err=True)
        _talk(conversation, sys.stdin.isatty())


def _talk(conversation: "Conversation", terminal: bool) -> None:
    """Answer line after line until /exit or the end of the input."""
    if terminal:
        with contextlib.suppress(ImportError):
            # Importing it gives input() line editing and a history. Windows has none.
            importlib.import_module("readline")
    while True:
        try:
            line = _line(terminal)
            if line is None or line == "/exit":
                return
            if line == "/reset":
                conversation.reset()
                click.echo("The conversation is forgotten.", err=True)
            elif line == "/help":
                click.echo(HELP, err=True)
            elif line.startswith("/"):
                click.echo(f"There is no command {line.split()[0]}; /help lists them.", err=True)
            elif line:
                _answer(conversation, line, terminal)
        except KeyboardInterrupt:
            if not terminal:
                raise
            click.echo("\nCtrl-D or /exit ends.", err=True)


def _line(terminal: bool) -> str | None:
    """The next line without the spaces around it; None at the end of the input."""
    if not terminal:
        line = sys.stdin.readline()
        return line.strip() if line else None
    try:
        return input("> ").strip()
    except EOFError:
        click.echo()
        return None


def _answer(conversation: "Conversation", question: str, terminal: bool) -> None:
    """Print an answer as it comes. At a terminal, an interruption or a refusal is not the end of the conversation."""
    try:
        with contextlib.closing(conversation.answer(question)) as pieces:
            for piece in pieces:
                click.echo(piece, nl=False)
    except KeyboardInterrupt:
        if not terminal:
            raise
        click.echo(" [stopped]", nl=False, err=True)
    except D2QError as error:
        if not terminal:
            raise
        click.echo(f"Error: {error}", err=True)
        return
    click.echo()
