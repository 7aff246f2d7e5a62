"""Reading GGUF files: values of every kind, our types, unknown types, and no crash on any damaged file."""

from __future__ import annotations

import struct
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from d2q_edge.errors import D2QError
from d2q_edge.formats import tensor_types
from d2q_edge.formats.gguf_reader import GGUFFile, can_decode
from d2q_edge.formats.gguf_writer import GGUFTensor, write_gguf


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def header(tensors: int, keys: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def info(name: str, dims: tuple[int, ...], type_id: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_id, offset)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 32)


def write(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    return path


def malformed(tmp_path: Path, content: bytes, pattern: str) -> None:
    with pytest.raises(D2QError, match=pattern) as caught:
        GGUFFile(write(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_every_kind_of_value(tmp_path: Path) -> None:
    def metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_uint8("u8", 200)
        writer.add_int8("i8", -5)
        writer.add_uint16("u16", 60000)
        writer.add_int16("i16", -300)
        writer.add_uint32("u32", 4_000_000_000)
        writer.add_int32("i32", -70000)
        writer.add_uint64("u64", 2**63)
        writer.add_int64("i64", -(2**40))
        writer.add_float32("f32", 0.5)
        writer.add_float64("f64", 0.1)
        writer.add_bool("yes", True)
        writer.add_string("text", "grün")
        writer.add_array("texts", ["a", "", "ß"])
        writer.add_array("numbers", [1, -2, 3])
        writer.add_array("flags", [True, False])

    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_gguf(tmp_path / "x.gguf", "llama", [GGUFTensor("a", (2, 3), "f32", lambda: array)], metadata)
    file = GGUFFile(tmp_path / "x.gguf")

    def repeat(writer: gguf.GGUFWriter) -> None:
        for key, (kind, data) in file.packed.items():
            writer.kv_data[0][key] = gguf.gguf_writer.GGUFValue(data, gguf.GGUFValueType(kind))

    write_gguf(tmp_path / "copy.gguf", "llama", [], repeat)
    assert GGUFFile(tmp_path / "copy.gguf").packed == file.packed
    expected: dict[str, Any] = {
        "general.architecture": "llama",
        **{"u8": 200, "i8": -5, "u16": 60000, "i16": -300, "u32": 4_000_000_000, "i32": -70000},
        **{"u64": 2**63, "i64": -(2**40), "f32": 0.5, "f64": 0.1, "yes": True, "text": "grün"},
        "numbers": [1, -2, 3],
        "flags": [True, False],
    }
    assert {key: value for key, value in file.kv.items() if key != "texts"} == expected
    assert file.kv["texts"] == ["a", "", "ß"]
    assert file.tensors["a"].shape == (2, 3)
    assert file.tensors["a"].elements == 6
    assert np.array_equal(file.dequantize("a"), array)
    assert file.raw("a").tobytes() == array.tobytes()


@pytest.mark.parametrize("own", tensor_types.ALL, ids=lambda own: own.name)
def test_own_types(tmp_path: Path, own: tensor_types.TensorType) -> None:
    rng = np.random.default_rng(0)
    scales = rng.uniform(0.1, 1, (3, 512 // own.block_size)).astype(np.float16)
    codebooks = rng.integers(0, 256, (3, 16), np.uint8)
    codes = rng.integers(0, 16 if own.paired else 8, (3, own.codes(512)), np.uint8)
    packed = tensor_types.pack(own, scales, codebooks, codes)
    write_gguf(tmp_path / "x.gguf", "llama", [GGUFTensor("a", (3, 512), own.name, lambda: packed)], lambda writer: None)
    file = GGUFFile(tmp_path / "x.gguf")
    assert file.tensors["a"].type_name == own.name
    assert file.tensors["a"].nbytes == packed.nbytes
    assert np.array_equal(file.raw("a"), packed.reshape(-1))
    assert np.array_equal(file.dequantize("a"), tensor_types.dequantize(own, packed))


@pytest.mark.parametrize("own", tensor_types.ALL, ids=lambda own: own.name)
@pytest.mark.parametrize("scale", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("place", [0, 7, -1])
def test_scales_that_are_not_finite(tmp_path: Path, own: tensor_types.TensorType, scale: str, place: int) -> None:
    blocks = np.full((11, own.type_size), 0xFF, np.uint8)
    blocks[:, :2] = np.array([[-65504.0]], np.float16).view(np.uint8)
    tensors = [
        GGUFTensor(name, (1, 11 * own.block_size), own.name, lambda: blocks.reshape(1, -1)) for name in ("good", "bad")
    ]
    write_gguf(tmp_path / "x.gguf", "llama", tensors, lambda writer: None)
    GGUFFile(tmp_path / "x.gguf").check_blocks(chunk=3)
    content = bytearray((tmp_path / "x.gguf").read_bytes())
    offset = GGUFFile(tmp_path / "x.gguf").tensors["bad"].offset + place % 11 * own.type_size
    content[offset : offset + 2] = np.float16(scale).tobytes()
    with pytest.raises(D2QError, match=f"the scale of block {place % 11} of tensor bad is NaN or infinite"):
        GGUFFile(write(tmp_path, bytes(content))).check_blocks(chunk=3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_norm_that_is_not_finite(tmp_path: Path, value: float) -> None:
    norm = np.ones(32, np.float32)
    for norm[7], fine in ((1e30, True), (value, False)):
        tensors = [GGUFTensor("a.weight", (32,), "f32", lambda: norm)]
        write_gguf(tmp_path / f"{fine}.gguf", "llama", tensors, lambda writer: None)
        with nullcontext() if fine else pytest.raises(D2QError, match=r"damaged: NaN or infinity in a\.weight"):
            GGUFFile(tmp_path / f"{fine}.gguf").check_blocks()


def test_other_types_are_not_looked_at(tmp_path: Path) -> None:
    array = np.full((1, 32), np.nan, np.float32)
    write_gguf(tmp_path / "x.gguf", "llama", [GGUFTensor("a", (1, 32), "f32", lambda: array)], lambda writer: None)
    GGUFFile(tmp_path / "x.gguf").check_blocks()


def test_agrees_with_gguf_py(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((4, 64)).astype(np.float32) for name in ("f32", "f16", "bf16", "q8_0", "q4_0")}
    tensors = [GGUFTensor(name, (4, 64), name, lambda name=name: arrays[name]) for name in arrays]  # type: ignore[misc]
    write_gguf(tmp_path / "x.gguf", "llama", tensors, lambda writer: writer.add_array("texts", ["a", "b"]))
    file = GGUFFile(tmp_path / "x.gguf")
    reference = gguf.GGUFReader(tmp_path / "x.gguf")
    assert len(reference.tensors) == len(file.tensors)
    for other in reference.tensors:
        expected = gguf.quants.dequantize(other.data, other.tensor_type)
        assert np.array_equal(file.dequantize(other.name), expected.reshape(4, 64))
        assert file.tensors[other.name].nbytes == other.n_bytes
    assert file.kv["texts"] == reference.get_field("texts").contents()


def test_unknown_type_reaches_to_the_next_tensor(tmp_path: Path) -> None:
    start = padded(header(3, 0) + info("a", (7,), 99, 0) + info("b", (2,), 0, 64) + info("c", (3,), 99, 96))
    file = GGUFFile(write(tmp_path, start + bytes(64) + struct.pack("<2f", 1, 2) + bytes(24) + b"\1\2\3"))
    assert file.tensors["a"].type_name == "type99"
    assert file.tensors["a"].nbytes == 64
    assert file.raw("c").tolist() == [1, 2, 3]
    assert file.dequantize("b").tolist() == [1.0, 2.0]
    with pytest.raises(D2QError, match=r"tensor a of .* has the type type99, which can't be decoded"):
        file.dequantize("a")


def test_version_2_and_other_alignment(tmp_path: Path) -> None:
    start = header(1, 1, version=2) + string("general.alignment") + struct.pack("<II", 4, 64)
    start += info("a", (1,), 0, 0)
    start += bytes(-len(start) % 64)
    assert GGUFFile(write(tmp_path, start + struct.pack("<f", 7))).dequantize("a").tolist() == [7.0]


def test_missing_file_and_tensor(tmp_path: Path) -> None:
    with pytest.raises(D2QError, match="there is no file"):
        GGUFFile(tmp_path / "absent.gguf")
    file = GGUFFile(write(tmp_path, header(0, 0)))
    with pytest.raises(D2QError, match="no tensor x"):
        file.raw("x")


KEY = string("k")
ONE = padded(header(1, 0) + info("a", (4,), 0, 0)) + bytes(16)


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (b"", "too short"),
        (b"PK\3\4" + bytes(60), "isn't a GGUF file"),
        (header(0, 0, version=1), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (header(0, 1), "reaches beyond the end"),
        (header(0, 1) + struct.pack("<Q", 2**63) + bytes(8), "reaches beyond the end"),
        (header(0, 2) + 2 * (KEY + struct.pack("<IB", 0, 1)), "the key k comes twice"),
        (header(0, 1) + KEY + struct.pack("<I", 77), "no value type 77"),
        (header(0, 1) + KEY + struct.pack("<IIQ", 9, 8, 2**60), "an array has 1152921504606846976 items"),
        (header(0, 1) + KEY + struct.pack("<IIQ", 9, 0, 2**63), "an array has 9223372036854775808 items"),
        (header(0, 1) + KEY + struct.pack("<IIQ", 9, 10, 2**20), "reaches beyond the end"),
        (header(0, 1) + KEY + struct.pack("<IIQ", 9, 0, 2**22 + 1) + bytes(2**22 + 9), "an array has 4194305 items"),
        (header(0, 1) + KEY + struct.pack("<IIQ", 9, 9, 1), "items of type 9"),
        (header(0, 1) + struct.pack("<Q", 1) + b"\xff" + bytes(8), "a key or tensor has the name"),
        (header(0, 1) + string("a\x1b[2J") + bytes(8), "has the name 'a.*x1b.*2J'"),
        (padded(header(1, 0) + info("a\nb", (4,), 0, 0)) + bytes(16), "has the name 'a.*nb'"),
        (header(0, 1) + string("general.alignment") + struct.pack("<II", 4, 0), "power of two"),
        (header(0, 1) + string("general.alignment") + struct.pack("<II", 4, 24), "power of two"),
        (header(0, 1) + string("general.alignment") + struct.pack("<I", 8) + string("32"), "power of two"),
        (padded(header(2, 0) + 2 * info("a", (4,), 0, 0)) + bytes(32), "the tensor a comes twice"),
        (padded(header(1, 0) + info("a", (1,) * 5, 0, 0)) + bytes(32), "5 dimensions"),
        (padded(header(1, 0) + info("a", (4, 0), 0, 0)) + bytes(32), "the tensor a is empty"),
        (padded(header(1, 0) + info("a", (4,), 0, 16)) + bytes(32), "isn't aligned"),
        (padded(header(2, 0) + info("a", (9,), 0, 0) + info("b", (4,), 0, 32)) + bytes(64), "a and b overlap"),
        (padded(header(2, 0) + info("b", (4,), 0, 32) + info("a", (9,), 0, 0)) + bytes(64), "a and b overlap"),
        (padded(header(2, 0) + info("a", (4,), 0, 0) + info("b", (4,), 0, 0)) + bytes(64), "a and b overlap"),
        (padded(header(1, 0) + info("a", (33,), 8, 0)) + bytes(64), "32 doesn't divide the width 33"),
        (padded(header(1, 0) + info("a", (2**40, 2**40), 0, 0)) + bytes(64), "truncated"),
        (padded(header(1, 0) + info("a", (4,), 99, 2**63)) + bytes(64), "truncated"),
        (ONE[:-1], "is truncated: it ends after"),
    ],
)
def test_malformed_files(tmp_path: Path, content: bytes, pattern: str) -> None:
    malformed(tmp_path, content, pattern)


def test_mutated_files_never_crash(tmp_path: Path) -> None:
    packed = np.zeros((2, tensor_types.D2Q2_64.row_bytes(64)), np.uint8)
    array = np.ones((2, 64), np.float32)
    tensors = [
        GGUFTensor("a.weight", (2, 64), "d2q2_64", lambda: packed),
        GGUFTensor("b.weight", (2, 64), "q8_0", lambda: array),
    ]

    def metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_array("texts", ["one", "two"])
        writer.add_array("numbers", [1, 2, 3])

    write_gguf(tmp_path / "good.gguf", "llama", tensors, metadata)
    good = (tmp_path / "good.gguf").read_bytes()
    rng = np.random.default_rng(0)
    opened = 0
    for _ in range(1500):
        content = bytearray(good)
        for position in rng.integers(0, 350, rng.integers(1, 4)):
            content[position] = [0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))][rng.integers(6)]
        if rng.random() < 0.2:
            del content[rng.integers(len(content)) :]
        try:
            file = GGUFFile(write(tmp_path, bytes(content)))
            for name in file.tensors:
                file.dequantize(name)
            opened += 1
        except D2QError:
            pass
    assert 0 < opened < 1500


@pytest.mark.parametrize("kind", ["f32", "q8_0", "d2q2_64"])
def test_a_part_of_a_tensor(tmp_path: Path, kind: str) -> None:
    generator = np.random.default_rng(0)
    own = tensor_types.BY_NAME.get(kind)
    array = generator.standard_normal((3, 2, 64)).astype(np.float32)
    packed = np.zeros((3, 2, own.row_bytes(64)), np.uint8) if own else array
    packed[1] = 1
    write_gguf(tmp_path / "x.gguf", "llama", [GGUFTensor("a", (3, 2, 64), kind, lambda: packed)], lambda _: None)
    file = GGUFFile(tmp_path / "x.gguf")
    whole, raw = file.dequantize("a"), file.raw("a")
    for part in range(3):
        np.testing.assert_array_equal(file.dequantize("a", part), whole[part])
        np.testing.assert_array_equal(file.raw("a", part), raw[len(raw) // 3 * part :][: len(raw) // 3])
    assert whole[1].any()


def test_types_that_can_be_decoded() -> None:
    known = {kind.name for kind in gguf.GGML_QUANT_SIZES if can_decode(int(kind))}
    assert {"F32", "F16", "BF16", "Q8_0", "Q4_1", "Q4_K", "Q6_K", "IQ2_XXS", "IQ4_XS", "MXFP4"} < known
    assert not known & {"Q8_1", "Q8_K", "I32", "F64"}
    assert all(can_decode(own.id) for own in tensor_types.ALL)
    assert not can_decode(99)
