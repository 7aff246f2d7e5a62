"""Files that are whole or not there, also after a crash or a power cut.

A file is written under another name, flushed to the disk, and renamed; the directory entry is flushed last. Without the
first flush a file system may keep the new name and lose the content (ext4 with delayed allocation does); without the
second one it may forget the rename. Knows files and directories, nothing about what is in them.
"""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Flush a file, or a directory's entries, to the disk.

    Raises:
        OSError: it can't be opened, or the disk reports an error.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace(partial: Path, path: Path) -> None:
    """Give a completely written file its name; when this returns, it survives a power cut.

    Raises:
        OSError: a rename or flush failed; `path` is then what it was before, or the new file.
    """
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def make_directory(path: Path) -> None:
    """Make a directory, durably; it may exist.

    Raises:
        OSError: it can't be made.
    """
    path.mkdir(exist_ok=True)
    sync(path.parent)
