"""OUT.gguf.lock: two conversions into one file would write over each other's blocks, so that only one may run.

What a killed process leaves behind locks nothing (file_lock.py), and the next conversion takes it over. Knows nothing
about what is being written.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from d2q_edge.errors import D2QError
from d2q_edge.utils.file_lock import open_locked


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
    """The open lock file, with this process's id in it; None where there can't be one."""
    try:
        handle, _ = open_locked(path)
    except BlockingIOError as error:
        raise D2QError(f"another d2q-edge{_holder(path)} is writing {output}; wait for its end, or stop it") from error
    except OSError:
        return None
    with suppress(OSError):  # a full disk
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
    return handle


def _holder(path: Path) -> str:
    """Which process wrote itself into the lock file, for the message."""
    try:
        return f" (process {int(path.read_text('utf-8'))})"
    except (OSError, ValueError):
        return ""
