"""Directories for what is not kept: gone with their with block, or swept up later where the process died in it.

A process that is killed removes nothing, and what it leaves behind may be gigabytes. So its directory has a file that
it holds locked (file_lock.py), and whoever makes the next such directory beside it removes those whose lock is free.
Process ids wouldn't do, because they are given
out again, and containers that share a cache have the same ones; an age wouldn't, because a comparison can take days.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from d2q_edge.errors import D2QError
from d2q_edge.utils.file_lock import open_locked

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
    """The directory, and its lock file, open and locked; what can't be locked can't be swept up later, either."""
    while True:
        path = Path(tempfile.mkdtemp(dir=base, prefix=prefix))
        try:
            handle, _ = open_locked(path / LOCK)
        except (FileNotFoundError, BlockingIOError):
            # Another process sweeps it up before it could be locked.
            continue
        except OSError:
            shutil.rmtree(path, ignore_errors=True)
            raise
        return path, handle


def _remove_abandoned(base: Path, prefix: str) -> None:
    """Remove directories that nobody holds. One without a lock file has an owner that died before it made one."""
    for path in base.glob(f"{prefix}*"):
        # Not ours to read, or gone meanwhile, or held: then it stays.
        with suppress(OSError):
            if path.is_symlink() or not path.is_dir():
                continue
            handle, locked = open_locked(path / LOCK)
            if locked:
                shutil.rmtree(path, ignore_errors=True)
            os.close(handle)
