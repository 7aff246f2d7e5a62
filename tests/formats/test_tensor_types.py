"""The block formats, held against blocks worked out by hand and against loops over tensor_types.py's layouts."""

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2q_edge.formats.codebooks import PAIR_TABLE, SCALAR_TABLE
from d2q_edge.formats.tensor_types import (
    ALL,
    BY_ID,
    BY_NAME,
    D2Q2,
    D2Q2_64,
    D2Q3,
    D2Q3_64,
    GROUP,
    Q4_0,
    TensorType,
    dequantize,
    entries,
    pack,
    unpack,
)

U8 = npt.NDArray[np.uint8]
each_type = pytest.mark.parametrize("t", ALL, ids=lambda t: t.name)


def random_parts(t: TensorType, rows: int, columns: int, seed: int) -> tuple[npt.NDArray[np.float16], U8, U8]:
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((rows, t.blocks(columns))).astype(np.float16),
        rng.integers(0, 256 if t.has_codebooks else 2, (rows, columns // GROUP), dtype=np.uint8),
        rng.integers(0, 16 if t.paired or not t.has_codebooks else 8, (rows, t.codes(columns)), dtype=np.uint8),
    )


def slow_weight(t: TensorType, row: U8, n: int) -> np.float32:
    """Weight n of a packed row, bit by bit as tensor_types.py describes it."""
    block, n = divmod(n, t.block_size)
    groups = t.block_size // 32
    b = row[block * t.type_size : (block + 1) * t.type_size].tobytes()
    d = np.frombuffer(b[:2], "<f2")[0].astype(np.float32)
    cb, qs = b[2 : 2 + groups], b[2 + groups :]
    k, j = divmod(n, 32)
    if t is D2Q2:
        i = j % 16
        code = qs[16 * (k // 2) + i] >> (4 if k % 2 else 0) & 15
        entry = PAIR_TABLE[cb[k]][code][0 if j < 16 else 1]
    elif t is D2Q2_64:
        code = qs[j % 16] & 15 if k == 0 else qs[j % 16] >> 4
        entry = PAIR_TABLE[cb[k]][code][0 if j < 16 else 1]
    elif t is D2Q3:

        def code_of(j: int) -> int:
            low = (qs[32 * (k // 4) + j] >> (2 * (k % 4))) & 3
            return low + 4 * ((qs[64 + j] >> (2 * (k % 4) + k // 4)) & 1)

        entry = SCALAR_TABLE[cb[k]][code_of(j) + (8 * (code_of(j - 1) % 2) if j % 16 else 0)]
    else:

        def code_of(j: int) -> int:
            low = (qs[j % 16] >> (4 * k + 2 * (j // 16))) & 3
            return low + 4 * ((qs[16 + j % 8] >> (4 * k + j // 8)) & 1)

        entry = SCALAR_TABLE[cb[k]][code_of(j) + (8 * (code_of(j - 1) % 2) if j % 16 else 0)]
    return np.float32(d * np.float32(entry))


@pytest.mark.parametrize(
    ("t", "name", "number", "block_size", "type_size", "bits"),
    [
        (D2Q2, "d2q2", 80, 256, 74, 2.3125),
        (D2Q3, "d2q3", 81, 256, 106, 3.3125),
        (D2Q2_64, "d2q2_64", 82, 64, 20, 2.5),
        (D2Q3_64, "d2q3_64", 83, 64, 28, 3.5),
    ],
)
def test_sizes_and_ids(t: TensorType, name: str, number: int, block_size: int, type_size: int, bits: float) -> None:
    assert (t.name, t.id, t.block_size, t.type_size, t.bits_per_weight) == (name, number, block_size, type_size, bits)
    assert BY_NAME[name] is t and BY_ID[number] is t
    assert t.row_bytes(3 * block_size) == 3 * type_size


def test_d2q2_block_by_hand() -> None:
    block = np.zeros((1, 74), np.uint8)
    block[0, :2] = 0x00, 0x38  # d = 0.5
    block[0, 2:10] = 10, 11, 200, 201, 14, 15, 16, 17
    block[0, 10 + 16 + 3] = 0xA5  # qs[16 * 1 + 3]: pair 3 of group 2 has code 5, of group 3 code 10
    expected = np.empty(256, np.float32)
    for k, book in enumerate((10, 11, 200, 201, 14, 15, 16, 17)):
        expected[32 * k : 32 * k + 16] = 0.5 * PAIR_TABLE[book, 0, 0]
        expected[32 * k + 16 : 32 * k + 32] = 0.5 * PAIR_TABLE[book, 0, 1]
    expected[[67, 83]] = 0.5 * PAIR_TABLE[200, 5]
    expected[[99, 115]] = 0.5 * PAIR_TABLE[201, 10]
    np.testing.assert_array_equal(dequantize(D2Q2, block)[0], expected)


def test_d2q3_block_by_hand() -> None:
    block = np.zeros((1, 106), np.uint8)
    block[0, :2] = 0x00, 0xC0  # d = -2
    block[0, 2:10] = 20, 21, 22, 23, 24, 25, 26, 250
    block[0, 10 + 32 + 9] = 0b11_00_01_00  # qs[32 * 1 + 9]: low bits of weight 9 in groups 4 (0), 5 (1), 6 (0), 7 (3)
    block[0, 10 + 64 + 9] = 0b10_00_01_00  # qh[9]: bit 7 is the high bit of weight 9 in group 7, bit 2 that in group 1
    block[0, 10 + 15] = 0b00_00_00_11  # qs[15]: low bits of weight 15 in group 0 (3)
    block[0, 10 + 31] = 0b01_00_00_00  # qs[31]: low bits of weight 31 in group 3 (1)
    expected = -2 * np.repeat(SCALAR_TABLE[[20, 21, 22, 23, 24, 25, 26, 250], 0].astype(np.float32), 32)
    expected[32 * 1 + 9] = -2 * SCALAR_TABLE[21, 4]  # an even code: nothing changes after it
    expected[32 * 5 + 9] = -2 * SCALAR_TABLE[25, 1]
    expected[32 * 5 + 10] = -2 * SCALAR_TABLE[25, 8 + 0]  # code 0 after an odd one
    expected[32 * 7 + 9] = -2 * SCALAR_TABLE[250, 7]
    expected[32 * 7 + 10] = -2 * SCALAR_TABLE[250, 8 + 0]
    expected[15] = -2 * SCALAR_TABLE[20, 3]  # weights 16 and 32 have none before them
    expected[32 * 3 + 31] = -2 * SCALAR_TABLE[23, 1]
    np.testing.assert_array_equal(dequantize(D2Q3, block)[0], expected)


def test_d2q2_64_block_by_hand() -> None:
    block = np.zeros((1, 20), np.uint8)
    block[0, :2] = 0x00, 0x3C  # d = 1
    block[0, 2:4] = 5, 100
    block[0, 4 + 15] = 0x2F  # qs[15]: the last pair of group 0 has code 15, of group 1 code 2
    expected = np.repeat([PAIR_TABLE[5, 0], PAIR_TABLE[100, 0]], 16).astype(np.float32)
    expected[[15, 31]] = PAIR_TABLE[5, 15]
    expected[[47, 63]] = PAIR_TABLE[100, 2]
    np.testing.assert_array_equal(dequantize(D2Q2_64, block)[0], expected)


def test_d2q3_64_block_by_hand() -> None:
    block = np.zeros((1, 28), np.uint8)
    block[0, :2] = 0x00, 0x3C  # d = 1
    block[0, 2:4] = 7, 8
    block[0, 4 + 2] = 0b10_00_11_00  # qs[2]: low bits of weights 2, 18 (0, 3) of group 0 and 2, 18 (0, 2) of group 1
    block[0, 4 + 3] = 0b00_01_00_00  # qs[3]: low bits of weights 3, 19 (0, 0) of group 0 and 3, 19 (1, 0) of group 1
    block[0, 4 + 15] = 0b00_00_00_01  # qs[15]: low bits of weights 15, 31 (1, 0) of group 0
    block[0, 20 + 2] = 0b0100_0101  # qh[2]: high bits of weights 2 and 18 of group 0, 18 of group 1
    expected = np.repeat(SCALAR_TABLE[[7, 8], 0].astype(np.float32), 32)
    expected[2] = SCALAR_TABLE[7, 4]
    expected[18] = SCALAR_TABLE[7, 7]
    expected[19] = SCALAR_TABLE[7, 8 + 0]  # code 0 after an odd one
    expected[15] = SCALAR_TABLE[7, 1]  # weight 16 has none before it
    expected[32 + 18] = SCALAR_TABLE[8, 6]
    expected[32 + 3] = SCALAR_TABLE[8, 1]
    expected[32 + 4] = SCALAR_TABLE[8, 8 + 0]
    np.testing.assert_array_equal(dequantize(D2Q3_64, block)[0], expected)


@each_type
def test_dequantize_agrees_with_the_slow_loops(t: TensorType) -> None:
    columns = 512
    packed = np.random.default_rng(1).integers(0, 256, (2, t.row_bytes(columns)), dtype=np.uint8)
    packed[:, 1 :: t.type_size] &= 0x3F  # no infinite or NaN scales
    expected = [[slow_weight(t, row, n) for n in range(columns)] for row in packed]
    np.testing.assert_array_equal(dequantize(t, packed), np.array(expected, np.float32))


@each_type
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 4), blocks=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_pack_and_unpack_are_inverse(t: TensorType, rows: int, blocks: int, seed: int) -> None:
    columns = blocks * t.block_size
    scales, codebooks, codes = random_parts(t, rows, columns, seed)
    packed = pack(t, scales, codebooks, codes)
    assert packed.dtype == np.uint8 and packed.shape == (rows, t.row_bytes(columns))
    found = unpack(t, packed)
    assert [part.dtype for part in found] == [np.float16, np.uint8, np.uint8]
    for part, expected in zip(found, (scales, codebooks, codes), strict=True):
        np.testing.assert_array_equal(part, expected)
    noise = np.random.default_rng(seed).integers(0, 256, packed.shape, dtype=np.uint8)
    np.testing.assert_array_equal(pack(t, *unpack(t, noise)), noise)


@each_type
def test_codes_are_in_the_order_of_the_groups(t: TensorType) -> None:
    """The interface that the quantizer uses: which code belongs to which weights."""
    scales, codebooks, codes = random_parts(t, 1, 512, seed=2)
    found = entries(t, codebooks, codes)[0]
    for n in range(512):
        k, j = divmod(n, 32)
        if t.paired:
            assert found[n] == PAIR_TABLE[codebooks[0, k], codes[0, 16 * k + j % 16], j // 16]
        else:
            state = codes[0, n - 1] % 2 if j % 16 else 0
            assert found[n] == SCALAR_TABLE[codebooks[0, k], codes[0, n] + 8 * state]
    values = np.repeat(scales[0].astype(np.float32), t.block_size) * found.astype(np.float32)
    np.testing.assert_array_equal(dequantize(t, pack(t, scales, codebooks, codes))[0], values)


@each_type
def test_extreme_scales_are_exact(t: TensorType) -> None:
    scales = np.array([[2.0**-24, 65504.0, -0.0, -6e-5]], np.float16)
    _, codebooks, codes = random_parts(t, 1, 4 * t.block_size, seed=3)
    weights = dequantize(t, pack(t, scales, codebooks, codes)).reshape(4, -1)
    expected = scales[0, :, None].astype(np.float64) * entries(t, codebooks, codes).reshape(4, -1)
    np.testing.assert_array_equal(weights, expected)


@each_type
def test_wrong_input_is_refused(t: TensorType) -> None:
    scales, codebooks, codes = random_parts(t, 2, 512, seed=4)
    with pytest.raises(ValueError, match="don't fit"):
        pack(t, scales, codebooks[:, 1:], codes)
    with pytest.raises(ValueError, match="float16"):
        pack(t, scales, codebooks, codes.astype(np.int16))
    codes[1, 5] = 16 if t.paired else 8
    with pytest.raises(ValueError, match="too large"):
        pack(t, scales, codebooks, codes)
    with pytest.raises(ValueError, match="blocks"):
        unpack(t, np.zeros((1, t.type_size + 1), np.uint8))
    for columns in (0, t.block_size + 32):
        with pytest.raises(ValueError, match="multiple"):
            t.row_bytes(columns)


def test_q4_0_block_by_hand() -> None:
    block = np.zeros((2, 18), np.uint8)
    block[:, 1] = 0x38, 0xB8  # d = 0.5, then -0.5
    block[:, 2 + 5] = 0x2F  # weight 5 has code 15, weight 21 code 2
    expected = np.full(32, -4, np.float32)
    expected[[5, 21]] = 3.5, -3
    np.testing.assert_array_equal(dequantize(Q4_0, block), [expected, -expected])
    scales, codebooks, codes = unpack(Q4_0, block)
    assert scales.tolist() == [[0.5], [0.5]]
    assert codebooks.tolist() == [[0], [1]]
    assert codes[:, [0, 5, 21]].tolist() == [[0, 15, 2], [15, 0, 13]]
    np.testing.assert_array_equal(pack(Q4_0, scales, codebooks, codes), block)


def test_q4_0_is_decoded_as_gguf_does() -> None:
    packed = np.random.default_rng(6).integers(0, 256, (20, Q4_0.row_bytes(512)), dtype=np.uint8)
    packed[:, 1 :: Q4_0.type_size] &= 0xBF  # no infinite or NaN scales; both signs
    expected = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_0)
    np.testing.assert_array_equal(dequantize(Q4_0, packed), expected)


def test_q4_0_pack_and_unpack_are_inverse() -> None:
    parts = random_parts(Q4_0, 20, 512, seed=7)
    scales, codebooks, codes = np.abs(parts[0]), *parts[1:]
    packed = pack(Q4_0, scales, codebooks, codes)
    assert packed.shape == (20, Q4_0.row_bytes(512))
    for found, expected in zip(unpack(Q4_0, packed), (scales, codebooks, codes), strict=True):
        np.testing.assert_array_equal(found, expected)
    values = entries(Q4_0, codebooks, codes)
    np.testing.assert_array_equal(values, codes.astype(int) - 8 + np.repeat(codebooks.astype(int), 32, axis=1))
    np.testing.assert_array_equal(dequantize(Q4_0, packed), values * np.repeat(scales.astype(np.float32), 32, axis=1))
    noise = np.random.default_rng(8).integers(0, 256, packed.shape, dtype=np.uint8)
    np.testing.assert_array_equal(pack(Q4_0, *unpack(Q4_0, noise)), noise)


def test_q4_0_wrong_input() -> None:
    scales, codebooks, codes = random_parts(Q4_0, 2, 64, seed=9)
    scales = np.abs(scales)
    with pytest.raises(ValueError, match="two codebooks"):
        pack(Q4_0, scales, codebooks + np.uint8(2), codes)
    with pytest.raises(ValueError, match="no negative scales"):
        pack(Q4_0, -scales, codebooks, codes)
    codes[0, 0] = 16
    with pytest.raises(ValueError, match="too large"):
        pack(Q4_0, scales, codebooks, codes)
    assert BY_NAME["q4_0"] is Q4_0 and Q4_0 not in ALL and Q4_0.bits_per_weight == 4.5
