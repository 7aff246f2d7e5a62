"""How exactly matrix products are computed on GPUs that have a choice."""

from collections.abc import Iterator
from contextlib import contextmanager
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
