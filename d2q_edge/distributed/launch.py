"""Start the workers of `convert --gpus N` with torch's elastic launcher, and end all of them when one fails.

A worker is an ordinary d2q-edge process with torchrun's environment variables (RANK, WORLD_SIZE, ...), from which
`ProcessGroup` connects it to the others.
"""

import ctypes
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d2q_edge.errors import D2QError

SHUTDOWN_SECONDS = 5
"""Time that interrupted workers have to clean up before they are killed; one that is blocked in NCCL can't."""
_RUN = "d2q-edge-"
"""The workers' TORCHELASTIC_RUN_ID is this and the process id of their launcher."""
_PR_SET_PDEATHSIG = 1


def launch(world_size: int, command: Sequence[str]) -> None:
    """Run a command in several processes on this machine, and wait until all have ended.

    Rank 0 shares stdout and stderr of this process, whose main thread must call this, and which should end afterwards:
    signal handlers and logging stay as torch needs them. A signal that ends this process ends the workers first.

    Args:
        world_size: number of processes.
        command: program and arguments.

    Raises:
        D2QError: a worker failed; the message is that of its D2QError, if it called `report_failure`.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    logging.disable()  # the error below says what torch logs about a failure
    with tempfile.TemporaryDirectory(prefix=_RUN) as logs:
        config = LaunchConfig(
            *(1, 1, world_size),  # nodes at least and at most, and processes
            logs_specs=DefaultLogsSpecs(logs, redirects=dict.fromkeys(range(1, world_size), Std.ALL)),
            run_id=f"{_RUN}{os.getpid()}",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            # nohup has SIGHUP ignored.
            signals_to_handle=",".join(number.name for number, old in handlers.items() if old != signal.SIG_IGN),
        )
        try:
            # torch substitutes $-variables in arguments.
            elastic_launch(config, command[0])(*(argument.replace("$", "$$") for argument in command[1:]))
        except ChildFailedError as error:
            raise _explain(error, Path(logs)) from None
        except SignalException as error:
            signal.signal(error.sigval, handlers[error.sigval])
            signal.raise_signal(error.sigval)


def is_worker() -> bool:
    """Return whether this process shares a conversion with others, started by `launch` or torchrun."""
    return "WORLD_SIZE" in os.environ


def is_main() -> bool:
    """Return whether this is rank 0, the process that writes files and prints."""
    return os.environ.get("RANK", "0") == "0"


def is_launched() -> bool:
    """Return whether `launch` started this process, and will print the error that it reports."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(_RUN)


def die_with_launcher() -> None:
    """Have Linux kill this process when its launcher dies, however that happens, if it is a worker of `launch`."""
    if is_launched() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.environ["TORCHELASTIC_RUN_ID"] != f"{_RUN}{os.getppid()}":
            os._exit(1)


def report_failure(error: BaseException) -> None:
    """Tell the launcher, `launch` or torchrun, why this worker fails. Call it where the error is caught."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(error)


def _explain(error: Any, logs: Path) -> D2QError:
    """Describe the failure of a ChildFailedError that the others follow from: a D2QError, or else the first."""
    # A message is a dict if the worker called report_failure, else a string.
    messages = [failure.message for failure in error.failures.values() if isinstance(failure.message, dict)]
    for name, _, sentence in (message["message"].partition(": ") for message in messages):
        if name == D2QError.__name__:
            return D2QError(sentence)
    rank, failure = error.get_first_failure()
    if isinstance(failure.message, dict):
        details, reason = failure.message["extraInfo"]["py_callstack"], failure.message["message"]
    else:
        # Rank 0 has none: it prints to this process's stderr.
        details = "".join(log.read_text(errors="replace") for log in logs.glob(f"*/attempt_0/{rank}/stderr.log"))
        reason = failure.signal_name() if failure.exitcode < 0 else f"exit code {failure.exitcode}"
    sys.stderr.write(details)
    return D2QError(f"the process of rank {rank} failed ({reason}); repeat the command to continue")
