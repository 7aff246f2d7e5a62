"""Turn integers or 8-bit floats into weights, with scales and zero points that each serve a block of the matrix."""

from itertools import repeat

import torch

from d2q_edge.errors import D2QError

Block = tuple[int, int]
"""Height and width."""
_ROWS = 256
"""Rows at a time where each has scales of its own: these are repeated for all columns."""


def grid(shape: tuple[int, ...], block: Block) -> Block:
    """Return how many blocks a matrix has in each direction; those at its ends may be smaller."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def find_block(scales: tuple[int, ...], shape: Block, blocks: list[Block]) -> Block | None:
    """Return the first block of which a matrix has as many as there are scales; None if there is none.

    Scales have two dimensions; or one, if there is one scale for each row; or none or one, if there is a single scale.
    """
    for block in blocks:
        rows, columns = grid(shape, block)
        if scales == (rows, columns) or (columns == 1 and scales == (rows,)) or (rows == columns == 1 and not scales):
            return block
    return None


def block_size(value: object) -> Block:
    """Check a block's height and width from the config; raise D2QError if they aren't two positive integers."""
    match value:
        case [int(height), int(width)] if height > 0 and width > 0:
            return height, width
    raise D2QError(f"config.json: quantized weights can't have scales for blocks of the size {value!r:.40}")


def dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    height: int,
    groups: torch.Tensor,
) -> torch.Tensor:
    """Return (codes - zeros) * scales.

    Args:
        codes: integers or floats [rows, columns].
        scales: floats [ceil(rows / height), groups].
        zeros: numbers of the same shape; None for zero.
        height: rows that share scales.
        groups: the group of every column, int64 [columns].

    Returns:
        float32 [rows, columns], exact but for one rounding of the product.
    """
    values = codes.float()
    rows, grid_rows = (_ROWS, _ROWS) if height == 1 else (height, 1)
    own_zeros = repeat(None) if zeros is None else zeros.split(grid_rows)
    for piece, scale, zero in zip(values.split(rows), scales.split(grid_rows), own_zeros, strict=False):
        if zero is not None:
            piece.sub_(zero.float()[:, groups])
        piece.mul_(scale.float()[:, groups])
    return values


def dequantize_blocks(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, block: Block
) -> torch.Tensor:
    """Return the same for scales and zero points, of any shape that `find_block` accepts, of equal blocks."""
    counts = grid(codes.shape, block)
    groups = torch.arange(codes.shape[1]) // block[1]
    zeros = None if zeros is None else zeros.reshape(counts)
    return dequantize(codes, scales.reshape(counts), zeros, block[0], groups)


def check_groups(module: str, groups: torch.Tensor, count: int) -> torch.Tensor:
    """Return the groups of columns as stored (g_idx), as int64; raise D2QError if one isn't below `count`."""
    if groups.numel() and not 0 <= int(groups.min()) <= int(groups.max()) < count:
        raise D2QError(f"the quantized layer {module} has a g_idx that names groups without scales; it is damaged")
    return groups.long()
