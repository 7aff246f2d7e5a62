"""Parse and run `d2q-edge chat`."""

import contextlib
import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from d2q_edge.cli.common import PATH, Number, loading_options, sampling_options, take, threads_option
from d2q_edge.errors import D2QError
from d2q_edge.options import CHAT_CONTEXT, CHAT_TEMPERATURE, LoadOptions, SamplingOptions

if TYPE_CHECKING:
    from d2q_edge.runtime.chat import Conversation

HELP = """\
/help   show this list
/reset  forget the conversation
/exit   end (or Ctrl-D)
Ctrl-C stops an answer."""


@click.command("chat")
@click.argument("file", type=PATH)
@click.option("--system", help="System message.")
@click.option("--context", type=click.IntRange(64), default=CHAT_CONTEXT, help="Tokens of the whole conversation.")
@click.option("-n", "--tokens", type=click.IntRange(1), help="Tokens per answer at most.  [default: all that fit]")
@click.option("--temperature", type=Number(0), default=CHAT_TEMPERATURE, help="0 picks the most likely token.")
@sampling_options
@click.option("--seed", type=click.IntRange(0), help="Seed of the sampling.  [default: a random one]")
@loading_options
@threads_option
def command(file: Path, tokens: int | None, **options: Any) -> None:
    """Talk to a GGUF FILE that has a chat template.

    Ctrl-C stops an answer, Ctrl-D ends the conversation; /help lists the other commands. If the input isn't a
    terminal, each line is a message, and only the answers are printed to stdout.
    """
    from d2q_edge.runtime.chat import Conversation

    sampling, loading = take(SamplingOptions, options), take(LoadOptions, options)
    with Conversation(file, max_tokens=tokens, sampling=sampling, loading=loading, **options) as conversation:
        click.echo(f"{file}, a context of {conversation.context} tokens. /help lists the commands.", err=True)
        _talk(conversation, sys.stdin.isatty())


def _talk(conversation: "Conversation", terminal: bool) -> None:
    """Answer each line until /exit or the end of the input."""
    if terminal:
        with contextlib.suppress(ImportError):
            # Importing it gives input() line editing and a history.
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
    """Read the next line, stripped; None at the end of the input."""
    if not terminal:
        line = sys.stdin.readline()
        return line.strip() if line else None
    try:
        return input("> ").strip()
    except EOFError:
        click.echo()
        return None


def _answer(conversation: "Conversation", question: str, terminal: bool) -> None:
    """Print an answer as it is generated. At a terminal, Ctrl-C or an error doesn't end the conversation."""
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
