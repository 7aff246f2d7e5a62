"""OUT.gguf.lock: two conversions into one file would write over each other's blocks, so that only one may run.

The operating system drops a lock with the process that holds it, however that ends: a file that a killed process leaves
behind locks nothing, and the next conversion takes it over. Knows nothing about what is being written.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from d2q_edge.errors import D2QError


@contextmanager
def sole_writer(output: Path) -> Iterator[None]:
    """As long as the with block lasts, this process is the only one that may write `output`.

    Where no file can be made, there is no lock, either; whoever writes the output finds that out.

    Raises:
        D2QError: another process is at it.
    """
    path = Path(f"{output}.lock")
    handle = _acquire(path, output)
    try:
        yield
    finally:
        if handle is not None:
            # In this order: whoever opened the file before it went finds out that it is no longer the path's.
            path.unlink(missing_ok=True)
            os.close(handle)


def _acquire(path: Path, output: Path) -> int | None:
    """The lock file, open and locked, and still the one that the path leads to; None where there can't be one."""
    while True:
        try:
            handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        except OSError:
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(OSError):  # a full disk
                os.ftruncate(handle, 0)
                os.write(handle, f"{os.getpid()}\n".encode())
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                return handle
            os.close(handle)
        except BlockingIOError as error:
            os.close(handle)
            raise D2QError(
                f"another d2q-edge{_holder(path)} is writing {output}; wait for its end, or stop it"
            ) from error
        except OSError:
            # Some network file systems can't lock.
            return handle


def _holder(path: Path) -> str:
    """Which process wrote itself into the lock file, for the message."""
    try:
        return f" (process {int(path.read_text('utf-8'))})"
    except (OSError, ValueError):
        return ""
