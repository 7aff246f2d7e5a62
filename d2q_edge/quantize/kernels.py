"""Whether kernels of our own (*_cuda.py) can run on a device; where they can't, the same steps are done by torch.

PyTorch's CUDA builds for Linux bring Triton along, others don't.
"""

from functools import cache

import torch


@cache
def has_triton(device: torch.device) -> bool:
    """Whether it is a CUDA device, and Triton is there."""
    if device.type != "cuda":
        return False
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True
