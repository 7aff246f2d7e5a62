"""A file that one process at a time holds open and locked.

The operating system drops a lock with the process that holds it, however that ends: a file that a killed process leaves
behind locks nothing. Does not know what the lock is for.
"""

import fcntl
import os
from pathlib import Path


def open_locked(path: Path) -> tuple[int, bool]:
    """Open a file, made if it isn't there, and lock it; it is the one that the path leads to, not a deleted one.

    Returns:
        The handle, which the caller closes, and whether it is locked: some network file systems can't.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it can't be opened.
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
        if _is_open(path, handle):
            return handle, True
        os.close(handle)


def _is_open(path: Path, handle: int) -> bool:
    """Whether the path still leads to the open file, and not to another one or none."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
