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
    """Pack one row in which every entry of every codebook occurs at every position of a group where it can.

    For scalars: every code after an even code and after an odd one.
    """
    codes = 16 if t.paired else 8
    steps = [1] if t.paired else [1, 2]  # neighbors of different parity, and of the same
    orders = [(step * np.arange(t.codes(GROUP)) + shift) % codes for step in steps for shift in range(codes)]
    books = np.repeat(np.arange(256, dtype=np.uint8), len(orders))
    grouped = np.tile(np.array(orders, np.uint8), (256, 1))
    scales = np.ones((1, len(books) * GROUP // t.block_size), np.float16)
    return pack(t, scales, books[None, :], grouped.reshape(1, -1))


def every_scale(t: TensorType) -> U8:
    """Pack random blocks with the extreme scales."""
    blocks = len(SCALES)
    rng = np.random.default_rng(1)
    books = rng.integers(0, 256, (1, blocks * t.groups), dtype=np.uint8)
    codes = rng.integers(0, 16 if t.paired else 8, (1, t.codes(blocks * t.block_size)), dtype=np.uint8)
    return pack(t, SCALES[None, :], books, codes)


def largest_entries(t: TensorType, columns: int, sign: int) -> U8:
    """Pack a row of the largest weights of one sign that the tables have, which could overflow a kernel's sums."""
    # all codes are the same, so that the entries of scalars are those after an odd code or those after an even one
    repeated = SCALAR_TABLE[:, np.arange(8) + 8 * (np.arange(8) % 2)]
    table = (PAIR_TABLE.astype(int).sum(axis=2) if t.paired else repeated.astype(int)) * sign
    book, code = np.unravel_index(int(table.argmax()), table.shape)
    scales = np.ones((1, t.blocks(columns)), np.float16)
    books = np.full((1, columns // GROUP), book, np.uint8)
    return pack(t, scales, books, np.full((1, t.codes(columns)), code, np.uint8))
