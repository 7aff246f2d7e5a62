"""Files of intermediate results: they come back as they were, whole or not at all, and no damage goes unnoticed."""

import os
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from d2q_edge.errors import D2QError
from d2q_edge.formats import tensor_file
from d2q_edge.formats.tensor_file import load_tensors, save_tensors

ARRAYS: dict[str, Any] = {
    "weights/a": np.arange(12, dtype=np.uint8).reshape(3, 4),
    "weights/b": np.arange(12, dtype=np.uint8).reshape(4, 3).T,
    "floats/c.weight": np.array([1.5, -0.0, np.pi], dtype=np.float32),
    "floats/empty": np.zeros((0, 2), dtype=np.float32),
}
METADATA = {"types": {"a": "d2q2"}, "errors": {"a": 0.1}, "none": None, "list": [1, 2.5, "Käse"]}
DAMAGED = r"block.safetensors is damaged .*; remove it and convert again"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "block.safetensors"


def assert_content(path: Path) -> None:
    arrays, metadata = load_tensors(path)
    assert metadata == METADATA
    assert arrays.keys() == ARRAYS.keys()
    for name, expected in ARRAYS.items():
        assert arrays[name].dtype == expected.dtype
        assert arrays[name].shape == expected.shape
        assert arrays[name].tobytes() == expected.tobytes()


def test_round_trip(path: Path) -> None:
    save_tensors(path, ARRAYS, METADATA)
    assert list(path.parent.iterdir()) == [path]
    assert_content(path)


def test_nothing_but_metadata(path: Path) -> None:
    save_tensors(path, {}, {})
    assert load_tensors(path) == ({}, {})


def test_a_new_file_replaces_the_old_one(path: Path) -> None:
    save_tensors(path, {"old": np.zeros(3, np.float32)}, {"old": 1})
    save_tensors(path, ARRAYS, METADATA)
    assert_content(path)


def test_same_content_same_bytes(path: Path) -> None:
    save_tensors(path, ARRAYS, METADATA)
    first = path.read_bytes()
    save_tensors(path, ARRAYS, METADATA)
    assert path.read_bytes() == first


@pytest.mark.parametrize("keep", [0, 7, 40, -1])
def test_a_truncated_file(path: Path, keep: int) -> None:
    save_tensors(path, ARRAYS, METADATA)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(D2QError, match=DAMAGED):
        load_tensors(path)


def test_no_flipped_bit_goes_unnoticed(path: Path) -> None:
    save_tensors(path, ARRAYS, METADATA)
    good = path.read_bytes()
    for position in range(len(good)):
        for bit in (0, 5):
            path.write_bytes(good[:position] + bytes([good[position] ^ 1 << bit]) + good[position + 1 :])
            with pytest.raises(D2QError, match=DAMAGED):
                load_tensors(path)


@pytest.mark.parametrize(
    ("old", "new"), [(b'"U8"', b'"I8"'), (b"errors", b"arrows"), (b"weights/a", b"weights/e"), (b"[3,4]", b"[4,3]")]
)
def test_a_changed_header(path: Path, old: bytes, new: bytes) -> None:
    """Types, shapes, names and metadata are checked as the data is."""
    save_tensors(path, ARRAYS, METADATA)
    good = path.read_bytes()
    assert old in good
    path.write_bytes(good.replace(old, new))
    with pytest.raises(D2QError, match=DAMAGED):
        load_tensors(path)


def test_a_file_is_not_another_one(path: Path) -> None:
    save_tensors(path, ARRAYS, METADATA)
    other = path.with_name("other.safetensors")
    shutil.copy(path, other)
    with pytest.raises(D2QError, match=r"other.safetensors is damaged \(its checksum is wrong\)"):
        load_tensors(other)


def test_files_that_others_made(path: Path) -> None:
    for metadata in (None, {"d2q": '["", "{}"]'}, {"d2q": "[]"}, {"d2q": "{"}, {"d2q": "1"}, {"format": "pt"}):
        save_file({"a": np.zeros(1, np.uint8)}, path, metadata=metadata)
        with pytest.raises(D2QError, match=DAMAGED):
            load_tensors(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(D2QError, match=DAMAGED):
        load_tensors(path)


def test_a_missing_file(path: Path) -> None:
    with pytest.raises(D2QError, match=r"block.safetensors is damaged \(No such file"):
        load_tensors(path)


def test_what_was_read_lies_in_memory(path: Path) -> None:
    """It may be changed, and what happens to the file after the check does no harm."""
    save_tensors(path, ARRAYS, METADATA)
    arrays, _ = load_tensors(path)
    with path.open("r+b") as stream:
        stream.write(bytes(path.stat().st_size))
    for name, expected in ARRAYS.items():
        assert np.array_equal(arrays[name], expected)
        arrays[name] += 1


def test_interrupted_write(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is not there, or the old one still is."""

    def half(_: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    for before in (False, True):
        if before:
            save_tensors(path, ARRAYS, METADATA)
        with monkeypatch.context() as patch:
            patch.setattr(tensor_file, "save_file", half)
            with pytest.raises(KeyboardInterrupt):
                save_tensors(path, {}, {})
        assert path.exists() == before
    assert_content(path)
    save_tensors(path, {}, {})
    assert list(path.parent.iterdir()) == [path], "the next write takes what the interrupted one left"


def test_no_room_for_the_content(path: Path) -> None:
    """A limit of the process, which the system reports while the file is written, as it does a full disk."""
    large = {"a": np.zeros(100_000, np.uint8)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(D2QError, match=r"can't write .*block.safetensors .*File too large.*; free some disk space"):
            save_tensors(path, large, METADATA)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(path.parent.iterdir()) == [], "what is useless must not fill the disk"
    save_tensors(path, large, METADATA)
    assert load_tensors(path)[1] == METADATA


def test_no_room_for_the_name(path: Path) -> None:
    """The content is written, but the rename fails."""
    path.mkdir()
    with pytest.raises(D2QError, match=r"can't write .*block.safetensors .*Is a directory.*; free some disk space"):
        save_tensors(path, ARRAYS, METADATA)
    assert list(path.parent.iterdir()) == [path], "what is useless must not fill the disk"


def test_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(D2QError, match=r"can't write .*block.safetensors"):
        save_tensors(tmp_path / "none" / "block.safetensors", ARRAYS, METADATA)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_is_read_only(path: Path) -> None:
    path.parent.chmod(0o500)
    try:
        with pytest.raises(D2QError, match=r"can't write .*block.safetensors"):
            save_tensors(path, ARRAYS, METADATA)
    finally:
        path.parent.chmod(0o700)


def test_content_is_flushed_before_it_has_its_name(path: Path, disk_events: list[tuple[str, str]]) -> None:
    save_tensors(path, ARRAYS, METADATA)
    assert disk_events == [("flush", "block.partial"), ("rename", path.name), ("flush", path.parent.name)]
