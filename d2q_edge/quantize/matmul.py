"""How exactly matrix products are computed on GPUs that have a choice."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import torch


@contextmanager
def matmul_precision(level: Literal["highest", "high"]) -> Iterator[None]:
    """During a with block: "highest" is float32; "high" rounds the factors to TF32's 10 bits, which is several times as
    fast on CUDA and does nothing on a CPU. Calibration activations come from bfloat16 and don't notice; the error
    feedback works on float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(level)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def prefers_products(device: torch.device) -> bool:
    """Whether matrix products are so much faster than everything else there that more and longer ones pay."""
    return device.type != "cpu"


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right, of float32 matrices nearly as exact as float32's own product (relative to |left| @ |right|, 2^-20).

    On GPUs with TF32 it is three products of what TF32 holds: of the leading 10 bits with each other, and of each with
    what the other leaves (2^-22 of the whole is left out). That is about three times as fast as float32 there.
    """
    if left.dtype != torch.float32 or not _has_tf32(left.device):
        return left @ right
    left_high, right_high = _leading_bits(left), _leading_bits(right)
    with matmul_precision("high"):
        small = torch.addmm((left - left_high) @ right_high, left_high, right - right_high)
        return torch.addmm(small, left_high, right_high)


def whole_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The same where `left` holds whole numbers below 2^10, of which TF32 loses nothing: two products are enough."""
    if not _has_tf32(left.device):
        return left @ right
    right_high = _leading_bits(right)
    with matmul_precision("high"):
        return torch.addmm(left @ (right - right_high), left, right_high)


def _leading_bits(values: torch.Tensor) -> torch.Tensor:
    """float32 with the last 13 of its 23 bits cleared."""
    return (values.contiguous().view(torch.int32) & -(1 << 13)).view(torch.float32)


@cache
def _has_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
