"""Files that are whole or not there: what is flushed, and what a failure leaves."""

import os
from pathlib import Path

import pytest

from d2q_edge.utils import durable


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
    durable.replace(partial, path)
    assert path.read_text() == "new"
    assert not partial.exists()
    assert flushed == [inode, tmp_path.stat().st_ino]


def test_replace_that_fails_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    with pytest.raises(FileNotFoundError):
        durable.replace(tmp_path / "absent", tmp_path / "x")
    assert (tmp_path / "x").read_text() == "old"


def test_a_disk_that_fails_is_noticed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write errors that the system kept to itself come out at the flush."""

    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    (tmp_path / "x").write_text("old")
    (tmp_path / "y").write_text("new")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        durable.replace(tmp_path / "y", tmp_path / "x")
    assert (tmp_path / "x").read_text() == "old"


def test_make_directory(tmp_path: Path, flushed: list[int]) -> None:
    for _ in range(2):
        durable.make_directory(tmp_path / "a")
        assert (tmp_path / "a").is_dir()
    assert flushed == [tmp_path.stat().st_ino] * 2
