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


def rows_per_program(rows: int, device: torch.device) -> int:
    """How many rows of a matrix a program of a kernel takes.

    Eight, where sixteen would leave processors of the GPU with one program, which spends most of its time waiting for
    itself. On an H200, from 1024 to 24576 rows, that is the faster one of both.
    """
    return 8 if rows < 24 * _processors(device) else 16


@cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1
