"""Directories for what is not kept: gone with their with block, or swept up later where the process died in it.

A process that is killed removes nothing, and what it leaves behind may be gigabytes. So its directory has a file that
it holds locked, and whoever makes the next such directory beside it removes those whose lock is free: the operating
system drops a lock with the process that holds it, however that ends. Process ids wouldn't do, because they are given
out again, and containers that share a cache have the same ones; an age wouldn't, because a comparison can take days.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from d2q_edge.errors import D2QError

LOCK = "lock"
"""Name of the locked file in the directory."""


@contextmanager
def scratch_directory(base: Path, prefix: str, remedy: str) -> Iterator[Path]:
    """A new directory in `base`, for as long as the with block lasts.

    Args:
        base: where there is room; made if it isn't there.
        prefix: of its name. Other directories of that prefix which no running process holds are removed.
        remedy: what the error's sentence tells people to do if nothing can be written there.

    Raises:
        D2QError: it can't be made.
    """
    try:
        base.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(base, prefix)
        path, handle = _make(base, prefix)
    except OSError as error:
        raise D2QError(f"can't write to {base} ({error.strerror or error}); {remedy}") from error
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(handle)


def _make(base: Path, prefix: str) -> tuple[Path, int]:
    """The directory, and its lock file, open and locked."""
    while True:
        path = Path(tempfile.mkdtemp(dir=base, prefix=prefix))
        try:
            handle = _open(path)
        except FileNotFoundError:
            # Another process swept it up before it could be locked.
            continue
        except OSError:
            shutil.rmtree(path, ignore_errors=True)
            raise
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            swept = not _is_open(path, handle)
        except BlockingIOError:
            swept = True
        except OSError:
            # Some network file systems can't lock; what is left behind there stays, because nobody can lock it later.
            swept = False
        if not swept:
            return path, handle
        os.close(handle)


def _remove_abandoned(base: Path, prefix: str) -> None:
    """Remove directories that nobody holds. One without a lock file has an owner that died before it made one."""
    for path in base.glob(f"{prefix}*"):
        # Not ours to read, or gone meanwhile, or held: then it stays.
        with suppress(OSError):
            if path.is_symlink() or not path.is_dir():
                continue
            handle = _open(path)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_open(path, handle):
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(handle)


def _open(path: Path) -> int:
    return os.open(path / LOCK, os.O_CREAT | os.O_RDWR, 0o600)


def _is_open(path: Path, handle: int) -> bool:
    """Whether the open file is still the directory's lock file, not one that was removed while it was waited for."""
    try:
        return os.path.samestat(os.fstat(handle), (path / LOCK).stat())
    except FileNotFoundError:
        return False
