"""The processes that share a conversion (ranks.py), started by the one that the user has started, which is the first.

torchrun does the same, but it imports torch before it starts anything, which takes seconds; and it can start processes
on several machines, which this can't. Knows the environment variables by which they find each other, and that an error
in one of them must end all: the others may be waiting for it where no exception reaches them.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

GRACE = 5.0
"""Seconds that the first process has to fail for the same reason, and to say so itself."""
_PR_SET_PDEATHSIG = 1


@contextmanager
def together(count: int, command: Sequence[str]) -> Iterator[None]:
    """Run a with block in `count` processes: in this one, and by a command in the others, which ends up here, too.

    The environment keeps saying that this process is one of several: how it ends depends on that (cli).

    Args:
        count: of processes; does nothing for one, or in a process that was started here or by torchrun.
        command: what the others run.
    """
    if count == 1 or "WORLD_SIZE" in os.environ:
        yield
        return
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    others = [_Other.start(command, {**shared, **_numbers(rank)}) for rank in range(1, count)]
    os.environ.update({**shared, **_numbers(0)})
    ending = threading.Event()
    threading.Thread(target=_watch, args=(others, ending), daemon=True).start()
    try:
        yield
    except BaseException:
        ending.set()
        for other in others:
            other.process.kill()
        raise
    # The others are not waited for: NCCL lets them end when this one does, and then nothing keeps them.
    ending.set()


@dataclass(frozen=True)
class _Other:
    """Another process, and what it has printed."""

    process: subprocess.Popen[bytes]
    printed: IO[bytes]

    @classmethod
    def start(cls, command: Sequence[str], environment: dict[str, str]) -> "_Other":
        printed = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=printed,
            preexec_fn=_end_with_parent,  # there are no threads yet
        )
        return cls(process, printed)

    def text(self) -> str:
        self.printed.seek(0)
        return self.printed.read().decode(errors="replace")


def _watch(others: Sequence[_Other], ending: threading.Event) -> None:
    """End this process when another one has failed."""
    while not ending.wait(0.2):
        for other in others:
            code = other.process.poll()
            if not code:
                continue
            if ending.wait(GRACE):
                return
            sys.stderr.write(other.text())
            sys.stderr.flush()
            for each in others:
                each.process.kill()
            os._exit(code if code > 0 else 1)


def _end_with_parent() -> None:
    """Let the system kill this process when the one that started it dies, however that may be (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _numbers(rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
