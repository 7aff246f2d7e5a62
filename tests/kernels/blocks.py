"""Make random and adversarial rows of packed blocks for the kernel tests."""

import numpy as np
import numpy.typing as npt

from d2q_edge.formats.codebooks import PAIR_TABLE, SCALAR_TABLE
from d2q_edge.formats.tensor_types import GROUP, TensorType, pack

U8 = npt.NDArray[np.uint8]
SCALES = np.array([0, -0.0, 6e-8, -6e-8, 6.1e-5, 1, -1, 65504, -65504], np.float16)
"""Zero, the smallest and largest subnormal, one and the largest number, of both signs."""


def random_rows(t: TensorType, rows: int, columns: int, seed: int = 0) -> U8:
    """Pack rows of uniformly random codes and codebooks, with scales around 0.01 of both signs."""
    rng = np.random.default_rng(seed)
    scales = rng.normal(0, 0.01, (rows, t.blocks(columns))).astype(np.float16)
    codebooks = rng.integers(0, 256, (rows, columns // GROUP), dtype=np.uint8)
    codes = rng.integers(0, 16 if t.paired else 8, (rows, t.codes(columns)), dtype=np.uint8)
    return pack(t, scales, codebooks, codes)


def every_entry(t: TensorType) -> U8:
    """Pack one row in which every code of every codebook occurs at every position of a group."""
    codes = 16 if t.paired else 8
    per_group = 16 if t.paired else 32
    books = np.repeat(np.arange(256, dtype=np.uint8), codes)
    shifts = np.tile(np.arange(codes, dtype=np.uint8), 256)
    grouped = (np.arange(per_group, dtype=np.uint8)[None, :] + shifts[:, None]) % codes
    scales = np.ones((1, len(books) * GROUP // t.block_size), np.float16)
    return pack(t, scales, books[None, :], grouped.reshape(1, -1).astype(np.uint8))


def every_scale(t: TensorType) -> U8:
    """Pack random blocks with the extreme scales."""
    blocks = len(SCALES)
    rng = np.random.default_rng(1)
    books = rng.integers(0, 256, (1, blocks * t.groups), dtype=np.uint8)
    codes = rng.integers(0, 16 if t.paired else 8, (1, t.codes(blocks * t.block_size)), dtype=np.uint8)
    return pack(t, SCALES[None, :], books, codes)


def largest_entries(t: TensorType, columns: int, sign: int) -> U8:
    """Pack a row of the largest weights of one sign that the tables have, which could overflow a kernel's sums."""
    table = (PAIR_TABLE.astype(int).sum(axis=2) if t.paired else SCALAR_TABLE.astype(int)) * sign
    book, code = np.unravel_index(int(table.argmax()), table.shape)
    scales = np.ones((1, t.blocks(columns)), np.float16)
    books = np.full((1, columns // GROUP), book, np.uint8)
    return pack(t, scales, books, np.full((1, t.codes(columns)), code, np.uint8))
