"""Start the workers of `convert --gpus N` with torch's elastic launcher, and end all of them when one fails.

A worker is an ordinary d2q-edge process with torchrun's environment variables (RANK, WORLD_SIZE, ...), from which
`ProcessGroup` connects it to the others.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2q_edge.errors import D2QError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

SHUTDOWN_SECONDS = 5
"""Time that interrupted workers have to clean up before they are killed; one that is blocked in NCCL can't."""
_LAUNCHER = "D2Q_LAUNCHER"
"""Environment variable of the workers: the process id of their launcher."""
_SIGNALS = "SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"
_PR_SET_PDEATHSIG = 1


def launch(world_size: int, command: Sequence[str]) -> None:
    """Run a command in several processes on this machine, and wait until all have ended.

    Rank 0 shares stdout and stderr of this process, whose main thread must call this. A signal that ends this process
    ends the workers first.

    Args:
        world_size: number of processes.
        command: program and arguments.

    Raises:
        D2QError: a worker failed; the message is that of its D2QError, if it called `report_failure`.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ[_LAUNCHER] = str(os.getpid())
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    handlers = {name: signal.getsignal(getattr(signal, name)) for name in _SIGNALS}
    received = None
    # Whatever torch logs about a failure is said by the error below.
    logging.disable()
    try:
        with tempfile.TemporaryDirectory(prefix="d2q-edge-") as logs:
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=world_size,
                logs_specs=DefaultLogsSpecs(logs, redirects=dict.fromkeys(range(1, world_size), Std.ALL)),
                run_id=uuid.uuid4().hex,
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                local_addr="localhost",
                max_restarts=0,
                # nohup has SIGHUP ignored.
                signals_to_handle=",".join(name for name in _SIGNALS if handlers[name] != signal.SIG_IGN),
            )
            try:
                # torch substitutes $-variables in arguments.
                elastic_launch(config, command[0])(*(argument.replace("$", "$$") for argument in command[1:]))
            except ChildFailedError as error:
                raise _explain(error.failures, Path(logs)) from None
            except SignalException as error:
                received = error.sigval
    finally:
        del os.environ[_LAUNCHER]
        for name, handler in handlers.items():
            signal.signal(getattr(signal, name), handler)
        logging.disable(logging.NOTSET)
    if received is not None:
        signal.raise_signal(received)


def is_worker() -> bool:
    """Return whether this process shares a conversion with others, started by `launch` or torchrun."""
    return "WORLD_SIZE" in os.environ


def is_main() -> bool:
    """Return whether this is rank 0, the process that writes files and prints."""
    return os.environ.get("RANK", "0") == "0"


def die_with_launcher() -> None:
    """Have Linux kill this process when its launcher dies, however that happens, if it is a worker of `launch`."""
    launcher = os.environ.get(_LAUNCHER)
    if launcher is not None and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(launcher):
            os._exit(1)


def is_launched() -> bool:
    """Return whether `launch` started this process, and will print the error that it reports."""
    return _LAUNCHER in os.environ


def report_failure(error: BaseException) -> None:
    """Tell the launcher, `launch` or torchrun, why this worker fails. Call it where the error is caught."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(error)


def _explain(failures: dict[int, ProcessFailure], logs: Path) -> D2QError:
    """Describe the failure that the others follow from: a D2QError, or else the first."""
    prefix = f"{D2QError.__name__}: "
    # failure.message is a string unless the worker called report_failure.
    messages: dict[int, Any] = {rank: failure.message for rank, failure in failures.items()}
    reported = {rank: message for rank, message in messages.items() if isinstance(message, dict)}
    for message in reported.values():
        if message["message"].startswith(prefix):
            return D2QError(message["message"].removeprefix(prefix))
    rank, failure = min(failures.items(), key=lambda item: item[1].timestamp)
    if rank in reported:
        details, reason = reported[rank]["extraInfo"]["py_callstack"], reported[rank]["message"]
    else:
        # Rank 0 has none: it prints to this process's stderr.
        details = "".join(log.read_text(errors="replace") for log in logs.glob(f"*/attempt_0/{rank}/stderr.log"))
        reason = failure.signal_name() if failure.exitcode < 0 else f"exit code {failure.exitcode}"
    sys.stderr.write(details)
    return D2QError(f"the process of rank {rank} failed ({reason}); repeat the command to continue")
