"""Multiply matrices in float32 precision, and in TF32 or bfloat16 where that is enough."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import torch

GRAM_STRIP, ACCELERATOR_STRIP = 192, 2048
"""Columns of a symmetric product at a time, on a CPU and elsewhere: enough for a matrix product at full speed."""


@contextmanager
def matmul_precision(level: Literal["highest", "high"]) -> Iterator[None]:
    """Set torch's float32 matmul precision during a with block.

    "highest" is float32. "high" rounds the factors to TF32, which is several times as fast on CUDA and changes nothing
    on a CPU: enough for calibration activations, which come from bfloat16 weights, but not for error feedback.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(level)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def is_accelerator(device: torch.device) -> bool:
    """Return whether few large matrix products beat many small ones, a triangular solver included."""
    return device.type != "cpu"


def with_float64(values: torch.Tensor) -> torch.Tensor:
    """Return values on a device that has float64: copied to the CPU from Apple's GPUs, which have none."""
    return values.cpu() if values.device.type == "mps" else values


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return left @ right for float32 matrices, with an error below 2^-20 |left| @ |right|.

    Where there is TF32, both factors are split into their leading 10 bits and the remainder; three TF32 products, all
    but remainder times remainder (2^-22 of the result), are about three times as fast as one in float32.
    """
    if left.dtype != torch.float32 or not _has_tf32(left.device):
        return left @ right
    left_high, right_high = _leading_bits(left), _leading_bits(right)
    with matmul_precision("high"):
        small = torch.addmm((left - left_high) @ right_high, left_high, right - right_high)
        return torch.addmm(small, left_high, right_high)


def integer_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return left @ right as `product`, for a `left` of integers below 2^10, which TF32 represents exactly."""
    if not _has_tf32(left.device):
        return left @ right
    right_high = _leading_bits(right)
    with matmul_precision("high"):
        return torch.addmm(left @ (right - right_high), left, right_high)


def has_bfloat16(device: torch.device) -> bool:
    """Return whether activations are multiplied in bfloat16: on CUDA, where TF32 takes twice as long."""
    return _has_tf32(device)


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left^T right to `total` in place, for activations [tokens, columns].

    Products are those of the ambient precision, or of bfloat16 where there is that; sums are always float32.
    """
    if has_bfloat16(total.device):
        total += torch.mm(left.bfloat16().T, right.bfloat16(), out_dtype=torch.float32)
    elif is_accelerator(total.device):
        total += left.T @ right
    else:
        total.addmm_(left.T, right)


def add_gram(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Add the upper triangle of rows^T rows to `total` in place, as `add_product`; `mirrored` completes the sums.

    It goes strip by strip, each without what is below the diagonal: little more than half of the work.
    """
    if has_bfloat16(total.device):
        rows = rows.bfloat16()
    strip = _strip(total.device)
    for start in range(0, len(total), strip):
        columns = slice(start, start + strip)
        add_product(total[columns, start:], rows[:, columns], rows[:, start:])


def mirrored(total: torch.Tensor) -> torch.Tensor:
    """Copy the upper triangle of sums of `add_gram` to the lower one, in place, and return them."""
    strip = _strip(total.device)
    for start in range(0, len(total), strip):
        stop = start + strip
        square = total[start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).T)
        total[stop:, start:stop] = total[start:stop, stop:].T
    return total


def _strip(device: torch.device) -> int:
    return ACCELERATOR_STRIP if is_accelerator(device) else GRAM_STRIP


def _leading_bits(values: torch.Tensor) -> torch.Tensor:
    """Clear the last 13 of float32's 23 fraction bits."""
    return (values.contiguous().view(torch.int32) & -(1 << 13)).view(torch.float32)


@cache
def _has_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
