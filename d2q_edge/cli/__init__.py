"""The command line: parses options and calls the library, nothing else. One file per command; here what they share.

Results go to stdout, messages and progress to stderr. Exit codes: 0 done, 1 the request can't be carried out, 2 wrong
usage, 130 interrupted (143 and 129 by SIGTERM and SIGHUP). Imports are inside the commands, because torch takes seconds
to load and --help should not.
"""

import atexit
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import click

from d2q_edge import __version__
from d2q_edge.cli import bench, chat, compare, convert, evaluate, inspect, run, runtime, serve
from d2q_edge.errors import D2QError, sentence

GOES_ON = " A conversion goes on where it stopped when the command is repeated."


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="d2q-edge")
def cli() -> None:
    """2- and 3-bit GGUF files for llama.cpp on laptops and phones.

    A model's way: convert it; inspect, eval, compare and bench the file; run, chat or serve. The patched
    llama.cpp that these need is built once by `d2q-edge runtime install`.

    Results go to stdout, messages and progress to stderr. Exit codes: 0 done, 1 the request can't be carried out (one
    sentence on stderr says why), 2 wrong usage, 130 interrupted.
    """


for module in (convert, inspect, evaluate, compare, bench, run, chat, serve, runtime):
    cli.add_command(module.command)


def main() -> None:
    """The console script: runs the command and turns what happened into an exit code."""
    try:
        with _ended_by_signals():
            _leave(cli(standalone_mode=False))
    except D2QError as error:
        click.echo(f"Error: {sentence(error)}", err=True)
        _fail(1)
    except click.ClickException as error:
        error.show()
        _fail(error.exit_code)
    except (click.Abort, KeyboardInterrupt, _Ended) as end:
        click.echo(f"Interrupted.{GOES_ON if 'convert' in sys.argv[1:2] else ''}", err=True)
        _fail(128 + (end.number if isinstance(end, _Ended) else signal.SIGINT))
    except OSError as error:
        # Everything else that can't be written says so itself. `| head` has seen enough.
        if not isinstance(error, BrokenPipeError):
            click.echo(f"Error: can't print the result: {error.strerror or error}", err=True)
        # What is still buffered would fail once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _fail(1)
    except Exception:
        if not _one_of_several():
            raise
        traceback.print_exc()
        _fail(1)


def _leave(code: int | None) -> NoReturn:
    """End a process that has done its work. With a GPU it is left to the system to take everything apart, for which
    Python takes two seconds."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        _flush()
        atexit._run_exitfuncs()
        os._exit(code or 0)
    sys.exit(code)


def _one_of_several() -> bool:
    """Whether this is one of the processes that share the work (ranks.py), as launch.py and torchrun start them."""
    return "WORLD_SIZE" in os.environ


def _fail(code: int) -> NoReturn:
    """End the process. One of several at once: NCCL would first wait for the others, which wait for this one, and who
    started them ends them when it is gone."""
    if _one_of_several():
        _flush()
        os._exit(code)
    sys.exit(code)


def _flush() -> None:
    """What is printed, wherever that goes."""
    for stream in (sys.stdout, sys.stderr):
        # Python has none for one that was closed when it began.
        if stream is not None:
            stream.flush()


class _Ended(BaseException):
    """A signal wants the process to end."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does, so that it cleans up; torchrun's processes have no time."""
    signals = [] if _one_of_several() else [signal.SIGTERM, signal.SIGHUP]
    before = {number: signal.getsignal(number) for number in signals}
    for number in signals:
        if before[number] == signal.SIG_DFL:
            signal.signal(number, _end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, _: object) -> None:
    raise _Ended(number)
