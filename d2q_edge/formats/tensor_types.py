"""The block formats d2q2, d2q3, d2q2_64, d2q3_64, and stock q4_0: sizes, ids, packing, unpacking, dequantizing.

Knows where each bit of a block lies and what it stands for. Does not know how scales, codebooks and codes are chosen
(encoder.py, quantize/) or how tensors get into a file (gguf_file.py). The layouts are the contract with the C side
(cpp_patch/): a block is a little-endian fp16 scale d, one codebook byte per group of 32 weights, then the codes.

Paired types (d2q2*): weights j and j + 16 of a group share one 4-bit code. Others (d2q3*): one 3-bit code per weight.
q4_0, for layers that deserve 4 bits, has one 4-bit code per weight in blocks of one group, and no codebook byte: it has
two codebooks, -8..7 and -7..8, and which one it is, is the sign of d. (In the file d may be negative; the scale of this
module's functions is its magnitude.)
Throughout, codes are in the order of the groups: codes[r, 16 * k + i] is the pair (32 * k + i, 32 * k + 16 + i) of row
r, or codes[r, 32 * k + j] is the weight 32 * k + j, with k counting groups over the whole row.
"""

from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

import numpy as np
import numpy.typing as npt

from d2q_edge.formats.codebooks import PAIR_TABLE, SCALAR_TABLE

GROUP = 32
"""Weights that share a codebook."""
SCALE_MAX, SCALE_TINY = 65504.0, 2.0**-24
"""The largest and the smallest positive number that float16, and so a block scale, can hold."""
U8 = npt.NDArray[np.uint8]
F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TensorType:
    """One block format: `block_size` weights in `type_size` bytes; `id` is its number in GGUF files and in ggml."""

    name: str
    id: int
    block_size: int
    type_size: int
    paired: bool
    switched: bool = True
    """Whether codebooks are chosen from our tables."""

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, scale and codebook bytes included."""
        return 8 * self.type_size / self.block_size

    @property
    def groups(self) -> int:
        """Groups (of 32 weights) per block."""
        return self.block_size // GROUP

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` weights.

        Raises:
            ValueError: `columns` is not a positive multiple of the block size.
        """
        return self.blocks(columns) * self.type_size

    def blocks(self, columns: int) -> int:
        """Blocks in a row of `columns` weights.

        Raises:
            ValueError: `columns` is not a positive multiple of the block size.
        """
        if columns <= 0 or columns % self.block_size:
            raise ValueError(f"{self.name} needs a positive multiple of {self.block_size} columns, not {columns}")
        return columns // self.block_size

    def codes(self, columns: int) -> int:
        """Codes in a row of `columns` weights: one per pair, or one per weight."""
        return columns // 2 if self.paired else columns

    @property
    def codebook_entries(self) -> int:
        """Codes are below this."""
        return 16 if self.paired or not self.switched else 8


D2Q2 = TensorType("d2q2", 80, 256, 74, True)
D2Q3 = TensorType("d2q3", 81, 256, 106, False)
D2Q2_64 = TensorType("d2q2_64", 82, 64, 20, True)
D2Q3_64 = TensorType("d2q3_64", 83, 64, 28, False)
Q4_0 = TensorType("q4_0", 2, 32, 18, False, switched=False)
ALL = (D2Q2, D2Q3, D2Q2_64, D2Q3_64)
"""Our own types."""
BY_NAME = {t.name: t for t in (*ALL, Q4_0)}
"""All types whose codes the quantizer chooses."""
BY_ID = {t.id: t for t in ALL}


def _unpack_pairs(qs: U8, groups: int) -> U8:
    bytes_ = qs.reshape(len(qs), groups // 2, 1, 16)
    return np.concatenate([bytes_ & 15, bytes_ >> 4], axis=2).reshape(len(qs), groups, 16)


# A 3-bit code is split into its low two bits and its high bit. Both layouts below view the weights of a block as
# [..., slot, byte]: the weights of one byte differ in the slot, which gives the shift. d2q3 uses one slot per group,
# so that a vector register of bytes holds one group; d2q3_64 has too few groups for that and splits the group too.
def _low_slots(codes: Any, t: TensorType) -> Any:
    return codes.reshape(len(codes), t.groups // 4, 4, 32) if t.groups == 8 else codes.reshape(len(codes), 1, 4, 16)


def _high_slots(codes: Any, t: TensorType) -> Any:
    return codes.reshape(len(codes), 8, t.block_size // 8)


def code_bytes(t: TensorType, codes: Any) -> list[Any]:
    """The bytes of a block's codes, in the parts that follow each other: uint8 [blocks, bytes].

    Args:
        t: the block format.
        codes: uint8 [blocks, groups, codes], numpy's or torch's; the result is the same kind of array.
    """
    if t.codebook_entries == 16:
        # Pairs: even groups in low nibbles, the next group in the high ones; q4_0: the halves of its group.
        halves = codes.reshape(len(codes), -1, 2, 16)
        parts = [halves[:, :, 0] | halves[:, :, 1] << 4]
    else:
        low, high = _low_slots(codes, t), _high_slots(codes, t)
        parts = [
            reduce(or_, [(low[:, :, slot] & 3) << 2 * slot for slot in range(4)]),
            reduce(or_, [(high[:, slot] >> 2) << slot for slot in range(8)]),
        ]
    return [part.reshape(len(codes), -1) for part in parts]


def _unpack_scalars(packed: U8, t: TensorType) -> U8:
    quarter = t.block_size // 4
    qs = packed[:, :quarter].reshape(len(packed), -1, 1, 32 if t.groups == 8 else 16)
    qh = packed[:, quarter:].reshape(len(packed), 1, -1)
    low = (qs >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & np.uint8(3)
    high = (qh >> np.arange(8, dtype=np.uint8)[:, None]) & np.uint8(1)
    shape = (len(packed), t.groups, GROUP)
    return low.reshape(shape) | high.reshape(shape) << np.uint8(2)


def _pack_uniform(scales: F16, codebooks: U8, codes: U8) -> U8:
    """q4_0's bytes [n, 18] of scales [n], codebooks [n] below 2 and codes [n, 32]."""
    d = np.where(codebooks == 1, -scales, scales)
    stored = np.where(codebooks[:, None] == 1, 15 - codes, codes)
    head = np.ascontiguousarray(d, dtype="<f2").view(np.uint8).reshape(-1, 2)
    return np.concatenate([head, *code_bytes(Q4_0, stored)], axis=1)


def _unpack_uniform(blocks: U8) -> tuple[F16, U8, U8]:
    d = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float16, copy=False)[:, 0]
    codes = np.concatenate([blocks[:, 2:] & np.uint8(15), blocks[:, 2:] >> np.uint8(4)], axis=1)
    codebooks = np.signbit(d).astype(np.uint8)
    return np.abs(d), codebooks, np.where(codebooks[:, None] == 1, 15 - codes, codes)


def pack(t: TensorType, scales: F16, codebooks: U8, codes: U8) -> U8:
    """Blocks as bytes (DESIGN section 2).

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
    if codes.size and codes.max() >= t.codebook_entries:
        raise ValueError(f"{t.name}: code {codes.max()} is too large")
    n = rows * blocks
    if not t.switched:
        if codebooks.size and (codebooks.max() > 1 or np.signbit(scales).any()):
            raise ValueError(f"{t.name}: there are two codebooks, and no negative scales")
        return _pack_uniform(scales.reshape(n), codebooks.reshape(n), codes.reshape(n, -1)).reshape(rows, -1)
    grouped = codes.reshape(n, t.groups, -1)
    head = np.ascontiguousarray(scales, dtype="<f2").view(np.uint8).reshape(n, 2)
    return np.concatenate([head, codebooks.reshape(n, t.groups), *code_bytes(t, grouped)], axis=1).reshape(
        rows, blocks * t.type_size
    )


def unpack(t: TensorType, packed: U8) -> tuple[F16, U8, U8]:
    """The inverse of pack: (scales float16, codebooks uint8, codes uint8) of uint8 [rows, bytes].

    Raises:
        ValueError: the row size is not a multiple of the block's.
    """
    rows, row_bytes = packed.shape
    if packed.dtype != np.uint8 or row_bytes % t.type_size:
        raise ValueError(
            f"{t.name}: expected uint8 rows of {t.type_size}-byte blocks, not {packed.dtype} {packed.shape}"
        )
    n = rows * row_bytes // t.type_size
    blocks = np.ascontiguousarray(packed).reshape(n, t.type_size)
    if not t.switched:
        d, books, stored = _unpack_uniform(blocks)
        return d.reshape(rows, -1), books.reshape(rows, -1), stored.reshape(rows, -1)
    scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float16, copy=False).reshape(rows, -1)
    codebooks = blocks[:, 2 : 2 + t.groups]
    body = blocks[:, 2 + t.groups :]
    codes = _unpack_pairs(body, t.groups) if t.paired else _unpack_scalars(body, t)
    return scales, np.ascontiguousarray(codebooks).reshape(rows, -1), codes.reshape(rows, -1)


def entries(t: TensorType, codebooks: U8, codes: U8) -> npt.NDArray[np.int8]:
    """Table entries of each weight: int8 [rows, cols] from codebooks [rows, cols / 32] and codes (see pack)."""
    rows, groups = codebooks.shape
    if not t.switched:
        lowest = np.repeat(codebooks.astype(np.int8) - np.int8(8), GROUP, axis=1)
        return lowest + codes.astype(np.int8)
    grouped = codes.reshape(rows, groups, -1)
    if t.paired:
        looked_up = PAIR_TABLE[codebooks[:, :, None], grouped].swapaxes(2, 3)  # [rows, groups, component, pair]
    else:
        looked_up = SCALAR_TABLE[codebooks[:, :, None], grouped]
    return looked_up.reshape(rows, groups * GROUP)


def dequantize(t: TensorType, packed: U8) -> F32:
    """Weights float32 [rows, cols] of packed rows uint8 [rows, row_bytes]: exactly float32(d) * float32(entry).

    Raises:
        ValueError: the row size is not a multiple of the block's.
    """
    scales, codebooks, codes = unpack(t, packed)
    values = entries(t, codebooks, codes).astype(np.float32)
    return values * np.repeat(scales.astype(np.float32), t.block_size, axis=1)
