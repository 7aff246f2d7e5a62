"""Pack, unpack and dequantize the block formats d2q2, d2q3, d2q2_64, d2q3_64, and stock q4_0.

The layouts are the contract with the C side (cpp_patch/src/d2q-blocks.h). A block is a little-endian fp16 scale d, one
codebook byte per group of 32 weights, then the codes:

    block_d2q2     { half d; u8 cb[8]; u8 qs[64]; }            256 weights, 74 bytes
    block_d2q3     { half d; u8 cb[8]; u8 qs[64]; u8 qh[32]; } 256 weights, 106 bytes
    block_d2q2_64  { half d; u8 cb[2]; u8 qs[16]; }            64 weights, 20 bytes
    block_d2q3_64  { half d; u8 cb[2]; u8 qs[16]; u8 qh[8]; }  64 weights, 28 bytes
    block_q4_0     { half d; u8 qs[16]; }                      32 weights, 18 bytes (ggml-common.h)

d2q2: weights j and j + 16 of a group share a 4-bit code. d2q3: one 3-bit code per weight, low two bits in qs, high bit
in qh; its entry also depends on the low bit of the code before it (codebooks.py), a trellis of two states. q4_0 has
one 4-bit code per weight and two implied codebooks, -8..7 and -7..8, selected by the sign of d; in this module its
scale is the magnitude.

Codes are in the order of the groups, k counting those of a whole row r: codes[r, 16 * k + i] is the code of the weights
32 * k + i and 32 * k + 16 + i, or codes[r, 32 * k + j] is that of the weight 32 * k + j.
"""

from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

import numpy as np
import numpy.typing as npt

from d2q_edge.formats.codebooks import CHAIN, PAIR_CODES, PAIR_TABLE, SCALAR_CODES, SCALAR_TABLE

GROUP = 32
"""Weights that share a codebook."""
SCALE_MAX, SCALE_TINY = 65504.0, 2.0**-24
"""The largest and the smallest positive number that float16, and so a block scale, can hold."""
U8 = npt.NDArray[np.uint8]
F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TensorType:
    """One block format."""

    name: str  # lower case
    id: int  # number in GGUF files and in ggml
    block_size: int  # weights in a block
    type_size: int  # bytes of a block
    paired: bool  # whether two weights share a code
    has_codebooks: bool = True  # whether a byte per group selects a codebook from our tables

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, scale and codebook bytes included."""
        return 8 * self.type_size / self.block_size

    @property
    def groups(self) -> int:
        """Groups (of 32 weights) per block."""
        return self.block_size // GROUP

    def row_bytes(self, columns: int) -> int:
        """Return the bytes of a row of `columns` weights; raises as `blocks` does."""
        return self.blocks(columns) * self.type_size

    def blocks(self, columns: int) -> int:
        """Return the number of blocks in a row of `columns` weights.

        Raises:
            ValueError: `columns` is not a positive multiple of the block size.
        """
        if columns <= 0 or columns % self.block_size:
            raise ValueError(f"{self.name} needs a positive multiple of {self.block_size} columns, not {columns}")
        return columns // self.block_size

    def codes(self, columns: int) -> int:
        """Return the number of codes in a row of `columns` weights."""
        return columns // 2 if self.paired else columns

    @property
    def code_count(self) -> int:
        """Number of different codes."""
        return PAIR_CODES if self.paired else SCALAR_CODES if self.has_codebooks else 16

    @property
    def windowed(self) -> bool:
        """Whether a weight's entry also depends on the code before it."""
        return self.has_codebooks and not self.paired


D2Q2 = TensorType("d2q2", 80, 256, 74, True)
D2Q3 = TensorType("d2q3", 81, 256, 106, False)
D2Q2_64 = TensorType("d2q2_64", 82, 64, 20, True)
D2Q3_64 = TensorType("d2q3_64", 83, 64, 28, False)
Q4_0 = TensorType("q4_0", 2, 32, 18, False, has_codebooks=False)
ALL = (D2Q2, D2Q3, D2Q2_64, D2Q3_64)
"""Our own types."""
BY_NAME = {t.name: t for t in (*ALL, Q4_0)}
"""All types whose codes the quantizer chooses."""
BY_ID = {t.id: t for t in ALL}


def code_bytes(t: TensorType, codes: Any) -> list[Any]:
    """Pack codes uint8 [blocks, groups, codes], numpy's or torch's, into (qs, qh), each uint8 [blocks, bytes]."""
    if not t.windowed:
        # Pairs: even groups in low nibbles, the next group in the high ones; q4_0: the halves of its group.
        halves = codes.reshape(len(codes), -1, 2, 16)
        parts = [halves[:, :, 0] | halves[:, :, 1] << 4]
    else:
        # Weights of one byte differ in the slot, which gives the shift. In d2q3 a slot is a group, so that a vector
        # register of bytes holds one group; d2q3_64 has too few groups for that and splits the group too.
        low = codes.reshape(len(codes), -1, 4, min(GROUP, t.block_size // 4))
        high = codes.reshape(len(codes), 8, -1)
        parts = [
            reduce(or_, [(low[:, :, slot] & 3) << 2 * slot for slot in range(4)]),
            reduce(or_, [(high[:, slot] >> 2) << bit for slot, bit in enumerate(_high_bits(t))]),
        ]
    return [part.reshape(len(codes), -1) for part in parts]


def _high_bits(t: TensorType) -> list[int]:
    """Return the bit of a byte of qh that each of its eight weights has.

    In d2q3 those of four groups are two bits apart, as their low bits are in qs: a kernel puts the low bit of the code
    before in between, and has both upper bits of a table's index of four groups in one register.
    """
    return [2 * (slot % 4) + slot // 4 if t.block_size == 256 else slot for slot in range(8)]


def _unpack_pairs(qs: U8) -> U8:
    halves = qs.reshape(len(qs), -1, 1, 16)
    return np.concatenate([halves & 15, halves >> 4], axis=2)


def _unpack_scalars(packed: U8, t: TensorType) -> U8:
    quarter = t.block_size // 4
    qs = packed[:, :quarter].reshape(len(packed), -1, 1, min(GROUP, quarter))
    qh = packed[:, quarter:].reshape(len(packed), 1, -1)
    low = (qs >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & np.uint8(3)
    high = (qh >> np.array(_high_bits(t), np.uint8)[:, None]) & np.uint8(1)
    return low.reshape(len(packed), -1) | high.reshape(len(packed), -1) << np.uint8(2)


def pack(t: TensorType, scales: F16, codebooks: U8, codes: U8) -> U8:
    """Pack rows of blocks.

    Args:
        t: the block format.
        scales: float16 [rows, cols / block_size], the block scales d.
        codebooks: uint8 [rows, cols / 32].
        codes: uint8 [rows, cols / 2], below 16 (paired types), or [rows, cols], below 8 (q4_0: 16).

    Returns:
        uint8 [rows, t.row_bytes(cols)].

    Raises:
        ValueError: shapes or dtypes don't fit together, or a code is too large.
    """
    rows, blocks = scales.shape
    columns = blocks * t.block_size
    if codebooks.shape != (rows, columns // GROUP) or codes.shape != (rows, t.codes(columns)):
        raise ValueError(f"{t.name}: scales {scales.shape}, codebooks {codebooks.shape}, codes {codes.shape} don't fit")
    if scales.dtype != np.float16 or codebooks.dtype != np.uint8 or codes.dtype != np.uint8:
        raise ValueError(f"{t.name}: expected float16 scales and uint8 codebooks and codes")
    if codes.size and codes.max() >= t.code_count:
        raise ValueError(f"{t.name}: code {codes.max()} is too large")
    n = rows * blocks
    selectors = [codebooks.reshape(n, t.groups)]
    if not t.has_codebooks:
        if codebooks.size and (codebooks.max() > 1 or np.signbit(scales).any()):
            raise ValueError(f"{t.name}: there are two codebooks, and no negative scales")
        scales = np.where(codebooks == 1, -scales, scales)
        codes = np.where(selectors[0] == 1, 15 - codes.reshape(n, -1), codes.reshape(n, -1))
        selectors = []
    head = np.ascontiguousarray(scales, dtype="<f2").view(np.uint8).reshape(n, 2)
    return np.concatenate([head, *selectors, *code_bytes(t, codes.reshape(n, t.groups, -1))], axis=1).reshape(rows, -1)


def unpack(t: TensorType, packed: U8) -> tuple[F16, U8, U8]:
    """Return (scales float16, codebooks uint8, codes uint8) of packed rows uint8 [rows, bytes]; the inverse of pack.

    Raises:
        ValueError: the row size is not a multiple of the block's.
    """
    rows, row_bytes = packed.shape
    if packed.dtype != np.uint8 or row_bytes % t.type_size:
        wanted = f"{t.name}: expected uint8 rows of {t.type_size}-byte blocks"
        raise ValueError(f"{wanted}, not {packed.dtype} {packed.shape}")
    blocks = np.ascontiguousarray(packed).reshape(-1, t.type_size)
    scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float16, copy=False)
    if t.has_codebooks:
        codebooks, body = np.ascontiguousarray(blocks[:, 2 : 2 + t.groups]), blocks[:, 2 + t.groups :]
        codes = _unpack_pairs(body) if t.paired else _unpack_scalars(body, t)
    else:
        codebooks = np.signbit(scales).astype(np.uint8)
        codes = _unpack_pairs(blocks[:, 2:]).reshape(len(blocks), -1)
        scales, codes = np.abs(scales), np.where(codebooks == 1, 15 - codes, codes)
    return scales.reshape(rows, -1), codebooks.reshape(rows, -1), codes.reshape(rows, -1)


def table_index(codes: Any) -> Any:
    """Return the indices of scalars' entries in their codebooks, of codes uint8 [..., n * 16], numpy's or torch's."""
    chains = codes.reshape(*codes.shape[:-1], -1, CHAIN)
    index = chains.copy() if isinstance(codes, np.ndarray) else chains.clone()
    index[..., 1:] |= (chains[..., :-1] & 1) * SCALAR_CODES
    return index.reshape(codes.shape)


def entries(t: TensorType, codebooks: U8, codes: U8) -> npt.NDArray[np.int8]:
    """Return each weight's codebook entry, int8 [rows, cols], from codebooks [rows, cols / 32] and codes (see pack)."""
    rows, groups = codebooks.shape
    if not t.has_codebooks:
        return np.repeat(codebooks.astype(np.int8) - np.int8(8), GROUP, axis=1) + codes.astype(np.int8)
    codes = codes.reshape(rows, groups, -1)
    if t.paired:
        found = PAIR_TABLE[codebooks[:, :, None], codes].swapaxes(2, 3)  # [rows, groups, component, pair]
    else:
        found = SCALAR_TABLE[codebooks[:, :, None], table_index(codes)]
    return found.reshape(rows, groups * GROUP)


def dequantize(t: TensorType, packed: U8) -> F32:
    """Return the weights float32 [rows, cols] of packed rows (see unpack), exactly float32(d) * entry."""
    scales, codebooks, codes = unpack(t, packed)
    values = entries(t, codebooks, codes).astype(np.float32)
    return values * np.repeat(scales.astype(np.float32), t.block_size, axis=1)
