"""Write files atomically and durably, and make scratch directories that do not outlive their process for long.

A file is written under another name, flushed to disk and renamed, and then its directory is flushed. Without the first
flush a file system may keep the name and lose the content (ext4 does); without the second it may forget the rename.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from d2q_edge.errors import D2QError
from d2q_edge.utils.locks import open_locked

LOCK_NAME = "lock"
"""Name of the locked file in a scratch directory."""


def sync(path: Path) -> None:
    """Flush a file's content, or a directory's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace(partial: Path, path: Path) -> None:
    """Rename a completely written file to `path`; on return the rename has reached the disk.

    Raises:
        OSError: `path` is then what it was before, or the new file.
    """
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def make_directory(path: Path) -> None:
    """Create a directory durably; it may exist."""
    path.mkdir(exist_ok=True)
    sync(path.parent)


@contextmanager
def scratch_directory(base: Path, prefix: str, remedy: str) -> Iterator[Path]:
    """Create a directory in `base`, which is created if missing, and remove it at the end of the with block.

    The process keeps a file in it locked. A killed process removes nothing, so the next call with the same `base` and
    `prefix` removes every directory whose lock is free. (Process ids are reused, and containers that share a cache may
    have the same ones; age says nothing, because a comparison can take days.) `remedy` ends the error message.

    Raises:
        D2QError: the directory can't be created.
    """
    try:
        base.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(base, prefix)
        path, handle = _make_locked(base, prefix)
    except OSError as error:
        raise D2QError(f"can't write to {base} ({error.strerror or error}); {remedy}") from error
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(handle)


def _make_locked(base: Path, prefix: str) -> tuple[Path, int]:
    """Return a new directory and the handle of its lock file."""
    while True:
        path = Path(tempfile.mkdtemp(dir=base, prefix=prefix))
        try:
            return path, open_locked(path / LOCK_NAME)[0]
        except (FileNotFoundError, BlockingIOError):
            continue  # another process removed it before it was locked
        except OSError:
            shutil.rmtree(path, ignore_errors=True)
            raise


def _remove_abandoned(base: Path, prefix: str) -> None:
    """Remove unlocked directories; one without a lock file belongs to a process that died before creating it."""
    for path in base.glob(f"{prefix}*"):
        with suppress(OSError):  # not readable, gone meanwhile, or locked
            if path.is_symlink() or not path.is_dir():
                continue
            handle, locked = open_locked(path / LOCK_NAME)
            if locked:
                shutil.rmtree(path, ignore_errors=True)
            os.close(handle)


def split_number(entry: str) -> tuple[str, float | None]:
    """Split FILE:NUMBER; a file that exists under the whole name wins, and what is no number belongs to the name."""
    name, colon, number = entry.rpartition(":")
    if not colon or not name or Path(entry).exists():
        return entry, None
    try:
        return name, float(number)
    except ValueError:
        return entry, None
