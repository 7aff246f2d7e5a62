"""Writing GGUF files: layout, and that a file is whole or absent whatever goes wrong."""

from __future__ import annotations

import gc
import struct
import subprocess
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from d2q_edge.errors import D2QError
from d2q_edge.formats import gguf_writer, tensor_types
from d2q_edge.formats.gguf_writer import (
    GGUFTensor,
    block_and_type_size,
    check_output,
    data_size,
    encode,
    file_size,
    fitting_type,
    write_gguf,
)
from tests.paths import ROOT


def tensor(name: str, type_name: str, array: npt.NDArray[Any], shape: tuple[int, ...] | None = None) -> GGUFTensor:
    return GGUFTensor(name, shape or array.shape, type_name, lambda: array)


def no_keys(writer: gguf.GGUFWriter) -> None:
    """A file without other keys than its architecture."""


MATRIX = np.arange(128, dtype=np.float32).reshape(2, 64)
GOOD = [tensor("a.weight", "f32", MATRIX), tensor("b.weight", "f16", MATRIX)]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The path of a file to write, alone in its directory."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "model.gguf"


def refused(out: Path, pattern: str, tensors: list[GGUFTensor] = GOOD, **options: Any) -> None:
    """Writing must fail with a matching sentence and change nothing in the directory."""
    before = {path: path.read_bytes() for path in out.parent.glob("*") if path.is_file()}
    with pytest.raises(D2QError, match=pattern):
        write_gguf(out, "llama", tensors, no_keys, **options)
    assert {path: path.read_bytes() for path in out.parent.glob("*") if path.is_file()} == before


def test_bytes_by_hand(out: Path) -> None:
    values = np.array([[1.0, -2.0, 0.5]], np.float32)
    bias = np.array([3.0], np.float32)
    size = write_gguf(out, "llama", [tensor("w.weight", "f16", values), tensor("b", "f32", bias)], no_keys)
    expected = b"GGUF" + struct.pack("<IQQ", 3, 2, 1)
    expected += struct.pack("<Q", 20) + b"general.architecture" + struct.pack("<IQ", 8, 5) + b"llama"
    expected += struct.pack("<Q", 8) + b"w.weight" + struct.pack("<IQQIQ", 2, 3, 1, 1, 0)
    expected += struct.pack("<Q", 1) + b"b" + struct.pack("<IQIQ", 1, 1, 0, 32)
    expected += bytes(-len(expected) % 32)
    expected += struct.pack("<3e", 1.0, -2.0, 0.5) + bytes(26) + struct.pack("<f", 3.0) + bytes(28)
    assert out.read_bytes() == expected
    assert size == len(expected)
    assert data_size([tensor("w.weight", "f16", values), tensor("b", "f32", bias)]) == 64


def test_size_is_known_beforehand(out: Path) -> None:
    def metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_array("texts", ["some", "words"])

    def fail() -> npt.NDArray[Any]:
        raise RuntimeError("loaded")

    planned = file_size("llama", [GGUFTensor(t.name, t.shape, t.type, fail) for t in GOOD], metadata)
    assert planned == write_gguf(out, "llama", GOOD, metadata) == out.stat().st_size


@pytest.mark.parametrize(
    "value",
    [
        ["some", "", "wörds ▁"],
        [1, -2, 2**31 - 1],
        [0.1, -1e30],
        [True, False],
        [[1, 2], [3]],
        [gguf.TokenType.NORMAL, gguf.TokenType.BYTE],
        ("a", "b"),
        b"bytes",
    ],
    ids=str,
)
def test_arrays_are_packed_as_by_gguf_py(out: Path, value: Any) -> None:
    write_gguf(out, "llama", [], lambda writer: writer.add_array("key", value))
    theirs = gguf.GGUFWriter(out.with_name("theirs"), "llama")
    theirs.add_array("key", value)
    theirs.write_header_to_file()
    theirs.write_kv_data_to_file()
    theirs.close()
    expected = out.with_name("theirs").read_bytes()
    assert out.read_bytes() == expected + bytes(-len(expected) % 32)


@pytest.mark.parametrize("value", [["a", 1], [1, 2**31], ["\ud800"], [None], [1, True]], ids=ascii)
def test_arrays_that_cannot_be_packed(out: Path, value: list[Any]) -> None:
    with pytest.raises(D2QError, match="metadata can't be written"):
        write_gguf(out, "llama", [], lambda writer: writer.add_array("key", value))


def test_a_list_where_a_text_belongs(out: Path) -> None:
    """It would be packed as an array after a mark that says text, and nobody could read the file."""
    with pytest.raises(D2QError, match="the model's metadata can't be written"):
        write_gguf(out, "llama", [], lambda writer: writer.add_string("general.author", ["a", "b"]))


@pytest.mark.parametrize("own", tensor_types.ALL, ids=lambda own: own.name)
def test_own_types_by_number(out: Path, own: tensor_types.TensorType) -> None:
    packed = np.random.default_rng(0).integers(0, 256, (3, own.row_bytes(512)), np.uint8)
    write_gguf(out, "llama", [tensor("x.weight", own.name, packed, (3, 512))], no_keys)
    content = out.read_bytes()
    info = struct.pack("<Q", 8) + b"x.weight" + struct.pack("<IQQIQ", 2, 512, 3, own.id, 0)
    assert info in content
    assert content[content.index(info) + len(info) :].strip(b"\0").startswith(packed.tobytes().strip(b"\0")[:100])
    assert packed.tobytes() in content


@pytest.mark.parametrize("name", gguf_writer.STOCK_TYPES)
def test_sizes_of_stock_types(name: str) -> None:
    sizes = {"f32": (1, 4), "f16": (1, 2), "bf16": (1, 2), "q8_0": (32, 34), "q5_1": (32, 24), "q5_0": (32, 22)}
    sizes |= {"q4_1": (32, 20), "q4_0": (32, 18), "q6_k": (256, 210), "q5_k": (256, 176), "q4_k": (256, 144)}
    assert block_and_type_size(name) == sizes[name]
    whole = np.tile(MATRIX, 4)
    encoded = encode(tensor("x", name, whole))
    assert encoded.nbytes == tensor("x", name, whole).nbytes
    if name not in ("f32", "f16", "bf16"):
        decoded = gguf.quants.dequantize(encoded, gguf_writer.STOCK_TYPES[name])
        np.testing.assert_allclose(decoded, whole, atol=128 / 16)


@pytest.mark.parametrize(
    ("name", "width", "expected"),
    [
        ("q4_k", 512, "q4_k"),
        ("q4_k", 96, "q5_0"),
        ("q5_k", 96, "q5_1"),
        ("q6_k", 96, "q8_0"),
        ("q6_k", 72, "f16"),
        ("q8_0", 72, "f16"),
        ("q4_0", 32, "q4_0"),
        ("f32", 7, "f32"),
        ("bf16", 7, "bf16"),
        ("d2q2", 64, "f16"),
    ],
)
def test_fitting_types(name: str, width: int, expected: str) -> None:
    """The pairs of llama-quantize's tensor_type_fallback."""
    assert fitting_type(name, width) == expected


def test_q8_0_by_hand() -> None:
    values = np.zeros((1, 32), np.float32)
    values[0, :3] = [127.0, -63.5, 1.0]
    assert encode(tensor("x", "q8_0", values)).tobytes() == struct.pack("<e32b", 1.0, 127, -64, 1, *[0] * 29)


def test_a_stack_is_its_parts_without_gaps(out: Path) -> None:
    """Parts of 20 and of 34 bytes, and a tensor after them at the next multiple of 32."""
    packed = np.random.default_rng(0).integers(0, 256, (3, 1, 20), np.uint8)
    parts = [tensor(str(part[0, 0]), "d2q2_64", part, (1, 64)) for part in packed]
    values = np.arange(96, dtype=np.float32).reshape(3, 1, 32)
    floats = [tensor("", "q8_0", part) for part in values]
    stacks = [GGUFTensor.stack("own.weight", parts), GGUFTensor.stack("stock.weight", floats)]
    size = write_gguf(out, "llama", [*stacks, tensor("last", "f32", np.ones(8, np.float32))], no_keys)
    content = out.read_bytes()
    stock = encode(tensor("", "q8_0", values.reshape(3, 32))).tobytes()
    data = packed.tobytes() + bytes(4) + stock + bytes(26) + np.ones(8, np.float32).tobytes()
    assert len(data) == 64 + 128 + 32 == data_size([*stacks, tensor("last", "f32", np.ones(8, np.float32))])
    assert content[-len(data) :] == data
    assert (len(content) - len(data)) % 32 == 0
    assert size == len(content)
    assert struct.pack("<IQQQIQ", 3, 64, 1, 3, tensor_types.D2Q2_64.id, 0) in content
    assert struct.pack("<IQQQIQ", 3, 32, 1, 3, 8, 64) in content
    assert encode(stacks[0]).tobytes() == packed.tobytes()


def test_data_and_padding(out: Path) -> None:
    """Zeros lie between the tensors, also where an earlier attempt left something else."""
    generator = np.random.default_rng(0)

    def some(number: int, kind: str, rows: int) -> GGUFTensor:
        return tensor(f"{number}", kind, generator.normal(size=(rows, 64)).astype(np.float32))

    tensors = [some(i, kind, 1 + i % 3) for i, kind in enumerate(["f32", "q8_0", "f16", "q4_1", "bf16"] * 4)]
    tensors += [GGUFTensor.stack(f"stack {i}", [some(i + j, "q5_1", 1) for j in range(3)]) for i in range(4)]
    tensors.append(tensor("last", "q8_0", MATRIX))
    (out.parent / ".model.gguf.partial").write_bytes(b"x" * 100_000)
    write_gguf(out, "llama", tensors, no_keys)
    data = b""
    for one in tensors:
        data += b"".join(encode(part).tobytes() for part in one.parts or (one,))
        data += bytes(-len(data) % 32)
    assert out.read_bytes()[-len(data) - 1 :] == b"\0" + data


def test_existing_file_needs_force(out: Path) -> None:
    out.write_text("precious")
    refused(out, "exists already; use --force")
    write_gguf(out, "llama", GOOD, no_keys, force=True)
    assert out.read_bytes()[:4] == b"GGUF"
    assert list(out.parent.iterdir()) == [out]


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(D2QError, match=r"the output directory .*absent doesn't exist"):
        write_gguf(tmp_path / "absent" / "model.gguf", "llama", GOOD, no_keys)


def test_directory_as_output(tmp_path: Path) -> None:
    with pytest.raises(D2QError, match="is a directory; give the name of the file"):
        check_output(tmp_path, force=True)


def test_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(D2QError, match="doesn't exist"):
        check_output(tmp_path / "file" / "model.gguf", force=False)


def test_name_that_no_file_system_takes(tmp_path: Path) -> None:
    with pytest.raises(D2QError, match=r"can't write .*: File name too long"):
        check_output(tmp_path / ("x" * 300), force=False)


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a directory that even root can't write to")
def test_directory_that_is_not_writable() -> None:
    with pytest.raises(D2QError, match=r"can't write /sys/kernel/model.gguf: (Permission denied|Read-only)"):
        check_output(Path("/sys/kernel/model.gguf"), force=False)


def test_too_little_space(out: Path) -> None:
    refused(out, "MiB of free space, but the output needs 4294967296 MiB", [tensor("a", "f32", MATRIX, (2**30, 2**20))])
    check_output(out, force=False, size=data_size(GOOD))


def test_disk_that_fills_up(out: Path) -> None:
    """Every write to /dev/full fails as on a full disk, those of buffered bytes when they are flushed."""
    out.write_text("precious")

    def fill_the_disk(writer: gguf.GGUFWriter) -> None:
        (out.parent / ".model.gguf.partial").symlink_to("/dev/full")

    for tensors in (GOOD, [tensor("large", "f32", np.zeros((2**10, 2**10), np.float32))]):
        with pytest.raises(D2QError, match=r"the disk is full: .*model.gguf could not be written"):
            write_gguf(out, "llama", tensors, fill_the_disk, force=True)
        assert out.read_text() == "precious"
        assert list(out.parent.iterdir()) == [out]


def test_file_that_grows_too_large(out: Path) -> None:
    """For file systems, or limits, that know a largest file; the header, some or all of the data don't fit."""
    script = """
import resource, sys
from pathlib import Path
from d2q_edge.formats.gguf_writer import file_size
from tests.formats.test_gguf_writer import GOOD, no_keys, refused
size = file_size("llama", GOOD, no_keys)
for limit in (100, size - 600, size - 300, size - 1):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    refused(Path(sys.argv[1]), "can't write .*model.gguf: File too large")
"""
    subprocess.run([sys.executable, "-c", script, out], cwd=ROOT, check=True)
    assert list(out.parent.iterdir()) == []


def test_what_a_killed_process_left_is_taken_over(out: Path) -> None:
    left = out.parent / ".model.gguf.partial"
    left.write_bytes(b"x" * 100_000)
    check_output(out, force=False)
    assert list(out.parent.iterdir()) == []
    left.write_bytes(b"x" * 100_000)
    size = write_gguf(out, "llama", GOOD, no_keys)
    assert out.stat().st_size == size < 100_000
    assert list(out.parent.iterdir()) == [out]


def test_two_processes_do_not_write_the_same_file(out: Path) -> None:
    def load() -> npt.NDArray[Any]:
        refused(out, "another process is writing .*model.gguf")
        with pytest.raises(D2QError, match="another process is writing"):
            check_output(out, force=False)
        return MATRIX

    write_gguf(out, "llama", [GGUFTensor("a", (2, 64), "f32", load)], no_keys)
    assert list(out.parent.iterdir()) == [out]


def test_is_complete_before_it_has_its_name(out: Path) -> None:
    sizes: list[int] = []

    def check(partial: Path) -> None:
        assert not out.exists()
        sizes.append(partial.stat().st_size)

    size = write_gguf(out, "llama", GOOD, no_keys, check=check)
    assert sizes == [size] == [out.stat().st_size]


def test_file_that_the_check_refuses(out: Path) -> None:
    def check(partial: Path) -> None:
        raise D2QError("no good")

    refused(out, "no good", check=check)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_nothing_is_left_of_an_interrupted_write(out: Path, error: type[BaseException]) -> None:
    def fail() -> npt.NDArray[Any]:
        assert [path.name for path in out.parent.iterdir()] == [".model.gguf.partial"]
        raise error

    tensors = [*GOOD, GGUFTensor("c.weight", (2, 64), "f32", fail)]
    with pytest.raises(error):
        write_gguf(out, "llama", tensors, no_keys)
    assert list(out.parent.iterdir()) == []


def test_failure_keeps_the_old_file(out: Path) -> None:
    out.write_text("precious")
    huge = np.full((1, 4), 1e6, np.float32)
    refused(out, "x.weight has values too large for float16", [tensor("x.weight", "f16", huge)], force=True)
    assert out.read_text() == "precious"


def test_unknown_type_and_bad_width(out: Path) -> None:
    refused(out, "tensor type 'q2_k' can't be written; these can: f32, .*, d2q3_64", [tensor("x", "q2_k", MATRIX)])
    refused(out, "x can't be d2q2: 256 doesn't divide its width 64", [tensor("x", "d2q2", MATRIX)])


@pytest.mark.parametrize(
    ("type_name", "array", "shape"),
    [
        ("f32", MATRIX, (2, 32)),
        ("d2q2_64", MATRIX, (2, 64)),
        ("d2q2_64", np.zeros((2, 21), np.uint8), (2, 64)),
    ],
)
def test_promises_that_load_breaks(out: Path, type_name: str, array: npt.NDArray[Any], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="x: "):
        write_gguf(out, "llama", [tensor("x", type_name, array, shape)], no_keys)
    assert list(out.parent.iterdir()) == []


def test_tensors_are_loaded_one_at_a_time(out: Path) -> None:
    loaded: list[str] = []

    def loader(name: str) -> Callable[[], npt.NDArray[Any]]:
        def load() -> npt.NDArray[Any]:
            loaded.append(name)
            return MATRIX

        return load

    def metadata(writer: gguf.GGUFWriter) -> None:
        assert loaded == []
        assert writer.get_total_parameter_count()[0] == 256

    write_gguf(out, "llama", [GGUFTensor(name, (2, 64), "bf16", loader(name)) for name in "ab"], metadata)
    assert loaded == ["a", "b"]


@pytest.mark.parametrize("fails", [False, True])
def test_one_tensor_in_memory(out: Path, fails: bool) -> None:
    """A tensor is freed before the next is loaded, and when a failure ends the writing."""
    last: list[weakref.ref[Any]] = []

    def load() -> npt.NDArray[Any]:
        assert all(array() is None for array in last)
        array = np.zeros((1024, 1024), np.float32)
        last.append(weakref.ref(array))
        return array

    def fill_the_disk(writer: gguf.GGUFWriter) -> None:
        if fails:
            (out.parent / ".model.gguf.partial").symlink_to("/dev/full")

    part = GGUFTensor("", (1024, 1024), "f32", load)
    tensors = [GGUFTensor(name, part.shape, "f32", load) for name in "ab"]
    gc.collect()
    gc.disable()
    try:
        with suppress(D2QError):
            write_gguf(out, "llama", [*tensors, GGUFTensor.stack("c", [part, part])], fill_the_disk)
        assert len(last) == (1 if fails else 4)
        assert last[-1]() is None
    finally:
        gc.enable()
