"""`d2q-edge chat`: the terminal's side of a conversation."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from d2q_edge.cli.common import PATH
from d2q_edge.errors import D2QError

if TYPE_CHECKING:
    from d2q_edge.chat import Conversation

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
@click.option("--temperature", type=click.FloatRange(0), default=0.7, show_default=True)
@click.option("--seed", type=click.IntRange(0), help="For the same answers again.  [default: others every time]")
@click.option("--threads", type=click.IntRange(1), help="[default: one for each CPU]")
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
    from d2q_edge.chat import Conversation

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
        terminal = sys.stdin.isatty()
        for line in _typed() if terminal else sys.stdin:
            words = line.strip()
            if words == "/exit":
                return
            if words == "/reset":
                conversation.reset()
                click.echo("The conversation is forgotten.", err=True)
            elif words == "/help":
                click.echo(HELP, err=True)
            elif words.startswith("/"):
                click.echo(f"There is no command {words.split()[0]}; /help lists them.", err=True)
            elif words:
                _answer(conversation, words, terminal)


def _typed() -> Iterator[str]:
    """Lines from the terminal until Ctrl-D."""
    with contextlib.suppress(ImportError):
        # Importing it gives input() line editing and a history. Windows has none.
        importlib.import_module("readline")
    while True:
        try:
            yield input("> ")
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo("\nCtrl-D or /exit ends.", err=True)


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
