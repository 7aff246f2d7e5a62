"""Run a kernel on the rows of a matrix in as many threads as torch uses; ctypes releases Python's lock meanwhile."""

import ctypes
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache

import torch

from d2q_edge.quantize.native.library import library
from d2q_edge.quantize.native.tables import Tables

PARTS = 4
"""Parts of the rows per thread, so that all end at about the same time."""
LEAST = 8
"""Rows that a kernel takes at once, at most (lanes.h)."""


def run(name: str, tables: Tables, rows: int, *tensors: torch.Tensor | None) -> None:
    """Call a kernel for all rows, which don't influence each other.

    Args:
        name: of the function, without its prefix.
        tables: its first argument.
        rows: of which each call gets a part.
        tensors: the other arguments, contiguous; None becomes a null pointer.
    """
    kernel = getattr(library(), f"d2q_{name}")
    threads = torch.get_num_threads()
    size = max(-(-rows // (threads * PARTS * LEAST)), 1) * LEAST if threads > 1 else rows

    def part(begin: int) -> None:
        # Made here, so that the tensors live until the last part has ended, even where `run` is interrupted.
        pointers = (ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors)
        kernel(tables.pointer, ctypes.c_int64(begin), ctypes.c_int64(min(begin + size, rows)), *pointers)

    begins = range(0, rows, size) if rows else range(0)
    if len(begins) < 2:
        for begin in begins:
            part(begin)
        return
    parts = [_pool(threads).submit(part, begin) for begin in begins]
    wait(parts)
    for each in parts:
        each.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="d2q")
