"""Directories that are not kept: removed at the end, kept while their process runs, swept up when it is gone."""

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
from d2q_edge.utils import scratch
from d2q_edge.utils.scratch import LOCK, scratch_directory

HOLD = """
import sys
from pathlib import Path
from d2q_edge.utils.scratch import scratch_directory
with scratch_directory(Path(sys.argv[1]), "work-", "") as path:
    (path / "large").write_bytes(bytes(1000))
    print(path, flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(base: Path) -> Iterator[tuple["subprocess.Popen[str]", Path]]:
    """Another process in its directory; it leaves when its stdin ends."""
    command = [sys.executable, "-c", HOLD, str(base)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_is_there_for_the_with_block(tmp_path: Path) -> None:
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


def test_of_running_and_of_killed_processes(tmp_path: Path) -> None:
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


def test_what_else_is_there_stays(tmp_path: Path) -> None:
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
def test_swept_up_too_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Another process removes the directory before this one has locked it: then it makes another one."""
    lock, made = fcntl.flock, tempfile.mkdtemp
    seen: list[str] = []

    def remove(path: Path) -> None:
        (path / LOCK).unlink(missing_ok=True)
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
            other = os.open(Path(seen[0]) / LOCK, os.O_RDWR)
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
    """It works, and nothing of others is removed, because nobody knows whether they still run."""
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

    monkeypatch.setattr(scratch, "open_locked", full)
    with (
        pytest.raises(D2QError, match=r"\(No space left on device\); set SOMETHING$"),
        scratch_directory(tmp_path / "new", "work-", "set SOMETHING"),
    ):
        pass
    assert list((tmp_path / "new").iterdir()) == []
