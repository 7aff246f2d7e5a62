"""Lock files between processes with flock(2); the lock ends with its process, even where the file stays behind."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from d2q_edge.errors import D2QError


def open_locked(path: Path) -> tuple[int, bool]:
    """Open a file, creating it if needed, and lock it exclusively.

    Return the file descriptor, which the caller closes, and whether it is locked: some network file systems can't.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the file can't be opened.
    """
    while True:
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise
        except OSError:
            return handle, False
        # The previous holder may have deleted the file between open and flock.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle, True
        os.close(handle)


@contextmanager
def sole_writer(output: Path) -> Iterator[None]:
    """Hold OUTPUT.lock, so that two conversions into one file don't overwrite each other's blocks.

    Where the lock file can't be created there is no lock; writing the output then fails with a better message.

    Raises:
        D2QError: another process holds the lock.
    """
    path = Path(f"{output}.lock")
    handle = None
    try:
        handle, _ = open_locked(path)
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
    except BlockingIOError as error:
        raise D2QError(f"another d2q-edge{_holder(path)} is writing {output}; wait for its end, or stop it") from error
    except OSError:
        pass  # no lock file, or a full disk and no process id in it
    try:
        yield
    finally:
        if handle is not None:
            # Unlink before closing: whoever opened the file in between notices that it was deleted.
            path.unlink(missing_ok=True)
            os.close(handle)


def _holder(path: Path) -> str:
    """Return " (process N)" where the lock file says which process holds it."""
    try:
        return f" (process {int(path.read_text('utf-8'))})"
    except (OSError, ValueError):
        return ""
