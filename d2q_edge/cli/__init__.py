"""The command line: one module per command, which parses options and calls the library; here the group and exit codes.

Results go to stdout, messages and progress to stderr. Commands import the library when they run, because torch takes
seconds to load and --help should not.
"""

import os
import signal
import sys
import traceback
from typing import NoReturn

import click

from d2q_edge import __version__
from d2q_edge.cli import adapter, bench, chat, compare, convert, evaluate, inspect, metadata, run, runtime, serve
from d2q_edge.distributed.launch import die_with_launcher, is_launched, is_worker, report_failure
from d2q_edge.errors import D2QError, sentence

RESUMABLE = " A conversion goes on where it stopped when the command is repeated."


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True})
@click.version_option(__version__, prog_name="d2q-edge")
def cli() -> None:
    """Make 2- and 3-bit GGUF files for llama.cpp on laptops and phones, measure them and run them.

    Convert a model; inspect, eval, compare, bench and edit the file; run, chat or serve. The commands that run a file
    need the patched llama.cpp, built once per machine by `d2q-edge runtime install`.

    Results go to stdout, messages and progress to stderr. Exit codes: 0 success, 1 the request can't be carried out
    (stderr says why in one sentence), 2 wrong usage, 130 interrupted.
    """


for module in (convert, inspect, metadata, adapter, evaluate, compare, bench, run, chat, serve, runtime):
    cli.add_command(module.command)


class Terminated(BaseException):
    """Raised in the main thread by SIGTERM and SIGHUP, as KeyboardInterrupt is by SIGINT."""

    def __init__(self, number: int) -> None:
        self.number = number


def main() -> None:
    """Run the command line (console script), and exit: 0, 1, 2, or 128 + the number of the signal that ended it."""
    die_with_launcher()
    # A worker may be blocked in NCCL, where Python calls no handler; nohup has SIGHUP ignored.
    for number in () if is_worker() else (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _terminate)
    try:
        sys.exit(cli(standalone_mode=False))
    except D2QError as error:
        _fail(1, f"Error: {sentence(error)}", error)
    except click.ClickException as error:
        error.show()
        _fail(error.exit_code)
    except (click.Abort, KeyboardInterrupt, Terminated) as end:
        message = f"Interrupted.{RESUMABLE if 'convert' in sys.argv[1:2] else ''}"
        _fail(128 + (end.number if isinstance(end, Terminated) else signal.SIGINT), message)
    except OSError as error:
        # The library's are D2QErrors, so this is stdout. Python would fail again on what is still buffered.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # `| head` has enough
            _fail(1)
        problem = D2QError(f"can't print the result: {error.strerror or error}")
        _fail(1, f"Error: {problem}", problem)
    except Exception as error:
        if not is_worker():
            raise
        _fail(1, traceback.format_exc(), error)


def _fail(code: int, message: str = "", error: BaseException | None = None) -> NoReturn:
    """Print a message, unless the launcher does that for its workers, and exit.

    A worker skips Python's clean-up, in which NCCL waits for the other workers, which wait for this one.
    """
    if is_worker() and error is not None:
        report_failure(error)
    if message and not is_launched():
        click.echo(message, err=True)
    if not is_worker():
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed by the caller
            stream.flush()
    os._exit(code)


def _terminate(number: int, _: object) -> NoReturn:
    raise Terminated(number)
