"""Atomic files: what is flushed, what a failure leaves. Scratch directories: removed at the end, or after a kill."""

import errno
import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from d2q_edge.errors import D2QError
from d2q_edge.utils import files
from d2q_edge.utils.files import LOCK_NAME, scratch_directory

HOLD = """
import sys
from pathlib import Path
from d2q_edge.utils.files import scratch_directory
with scratch_directory(Path(sys.argv[1]), "work-", "") as path:
    (path / "large").write_bytes(bytes(1000))
    print(path, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The inodes that are flushed, in order."""
    inodes: list[int] = []
    fsync = os.fsync

    def note(handle: int) -> None:
        inodes.append(os.fstat(handle).st_ino)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note)
    return inodes


def test_replace(tmp_path: Path, flushed: list[int]) -> None:
    partial, path = tmp_path / "x.partial", tmp_path / "x"
    path.write_text("old")
    partial.write_text("new")
    inode = partial.stat().st_ino
    files.replace(partial, path)
    assert path.read_text() == "new"
    assert not partial.exists()
    assert flushed == [inode, tmp_path.stat().st_ino]


@pytest.mark.parametrize("partial", ["absent", "/dev/null"])
def test_replace_that_fails_changes_nothing(tmp_path: Path, partial: str) -> None:
    """Flushing a device fails, as flushing a file does whose disk has an error; that is noticed before the rename."""
    (tmp_path / "x").write_text("old")
    if partial == "/dev/null":
        (tmp_path / "device").symlink_to(partial)
        partial = "device"
    with pytest.raises(OSError, match=r"No such file|Invalid argument|not supported"):
        files.replace(tmp_path / partial, tmp_path / "x")
    assert (tmp_path / "x").read_text() == "old"


def test_make_directory(tmp_path: Path, flushed: list[int]) -> None:
    for _ in range(2):
        files.make_directory(tmp_path / "a")
        assert (tmp_path / "a").is_dir()
    assert flushed == [tmp_path.stat().st_ino] * 2


@contextmanager
def holder(base: Path) -> Iterator[tuple["subprocess.Popen[str]", Path]]:
    """Run another process that has a scratch directory; it ends with its stdin."""
    command = [sys.executable, "-c", HOLD, str(base)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_exists_during_the_with_block(tmp_path: Path) -> None:
    base = tmp_path / "new" / "base"
    with scratch_directory(base, "work-", "") as path:
        assert path.parent == base and path.name.startswith("work-")
        (path / "some" / "thing").mkdir(parents=True)
        with scratch_directory(base, "work-", "") as other:
            assert other != path and path.is_dir()
        assert [path] == list(base.iterdir())
    with pytest.raises(KeyboardInterrupt), scratch_directory(base, "work-", ""):
        raise KeyboardInterrupt
    assert list(base.iterdir()) == []


def test_directories_of_killed_processes_are_removed(tmp_path: Path) -> None:
    with holder(tmp_path) as (process, held):
        with scratch_directory(tmp_path, "work-", ""):
            assert (held / "large").stat().st_size == 1000, "its process runs"
        process.kill()
        process.wait()
        assert (held / "large").is_file(), "a killed process removes nothing"
        with scratch_directory(tmp_path, "other-", ""):
            assert held.is_dir()
        with scratch_directory(tmp_path, "work-", "") as path:
            assert list(tmp_path.iterdir()) == [path]


def test_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / "work-file").write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x").write_text("x")
    (tmp_path / "work-link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "my-work-").mkdir()
    (tmp_path / "work-unlocked").mkdir()
    with scratch_directory(tmp_path, "work-", ""):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "my-work-", "work-file", "work-link"]
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["x"]


@pytest.mark.parametrize("moment", ["before the file", "before the lock", "while it is locked"])
def test_removed_before_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """When another process removes the new directory, another one is made."""
    lock, made = fcntl.flock, tempfile.mkdtemp
    seen: list[str] = []

    def remove(path: Path) -> None:
        (path / LOCK_NAME).unlink(missing_ok=True)
        path.rmdir()

    def make(**options: str) -> str:
        path = made(dir=options["dir"], prefix=options["prefix"])
        seen.append(path)
        if len(seen) == 1 and moment == "before the file":
            remove(Path(path))
        return path

    def flock(handle: int, operation: int) -> None:
        if len(seen) == 1 and moment == "before the lock":
            remove(Path(seen[0]))
        if len(seen) == 1 and moment == "while it is locked":
            other = os.open(Path(seen[0]) / LOCK_NAME, os.O_RDWR)
            lock(other, fcntl.LOCK_EX)
            try:
                lock(handle, operation)
            finally:
                remove(Path(seen[0]))
                os.close(other)
        lock(handle, operation)

    monkeypatch.setattr(tempfile, "mkdtemp", make)
    monkeypatch.setattr(fcntl, "flock", flock)
    with scratch_directory(tmp_path, "work-", "") as path:
        assert [str(path)] == seen[1:]
        assert list(tmp_path.iterdir()) == [path]
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other directories stay, because their processes may still run."""
    (tmp_path / "work-other").mkdir()

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with scratch_directory(tmp_path, "work-", "") as path:
        assert path.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["work-other"]


def test_no_handle_stays_open(tmp_path: Path) -> None:
    before = len(os.listdir("/dev/fd"))  # noqa: PTH208
    for name in range(5):
        (tmp_path / f"work-{name}").mkdir()
    with scratch_directory(tmp_path, "work-", ""):
        pass
    assert len(os.listdir("/dev/fd")) == before  # noqa: PTH208


def test_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(D2QError, match=r"^can't write to .*file \(File exists\); set SOMETHING$"),
        scratch_directory(tmp_path / "file", "work-", "set SOMETHING"),
    ):
        pass

    def full(path: Path) -> tuple[int, bool]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "open_locked", full)
    with (
        pytest.raises(D2QError, match=r"\(No space left on device\); set SOMETHING$"),
        scratch_directory(tmp_path / "new", "work-", "set SOMETHING"),
    ):
        pass
    assert list((tmp_path / "new").iterdir()) == []
