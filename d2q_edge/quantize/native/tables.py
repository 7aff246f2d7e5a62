"""Hold the tables of a CodebookSearch as the C code reads them (codebooks.h)."""

import ctypes

import numpy as np
import numpy.typing as npt
import torch

from d2q_edge.formats.codebooks import CODEBOOKS, SCALAR_STATES
from d2q_edge.quantize.codebook_search import EDGE, KNEE, REACH, SCALE_STEPS, CodebookSearch, bin_centers

SHORTLIST = 8
"""Codebooks per group that are measured exactly: at most 0.01 % above the best of all 256."""
RANKS_PER_UNIT, WORST_RANK = 4, 65535
"""Ranks are squared errors in quarters; the largest one stands for all larger ones."""
PATH_BINS = 256
"""Bins where an entry also depends on the code before."""
TOGETHER = 32
"""Codebooks whose ranks are computed at once."""


class _Struct(ctypes.Structure):
    _fields_ = (
        ("width", ctypes.c_int32),
        ("groups", ctypes.c_int32),
        ("bins", ctypes.c_int32),
        ("shortlist", ctypes.c_int32),
        ("knee", ctypes.c_float),
        ("edge", ctypes.c_float),
        ("reach", ctypes.c_float),
        ("largest", ctypes.c_float),
        ("unit", ctypes.c_float),
        ("levels", ctypes.c_void_p),
        ("ranks", ctypes.c_void_p),
        ("steps", ctypes.c_void_p),
        ("step_ends", ctypes.c_void_p),
        ("parts", ctypes.c_int32),
    )


class Tables:
    """The tables of one tensor type; `pointer` is to the struct."""

    def __init__(self, search: CodebookSearch, *, exhaustive: bool = False) -> None:
        """Prepare the tables of a search on a CPU; `exhaustive` measures all codebooks exactly."""
        kind = search.tensor_type
        bins = PATH_BINS if kind.windowed else search.bins
        arrays = (
            search.columns.numpy(),
            path_ranks(search) if kind.windowed else ranks(search.error_table),
            np.array([factor for part in SCALE_STEPS for factor in part], np.float32),
            np.cumsum([len(part) for part in SCALE_STEPS], dtype=np.int32),
        )
        self._arrays = tuple(np.ascontiguousarray(array) for array in arrays)
        self._struct = _Struct(
            search.levels.shape[2],
            kind.groups,
            bins,
            CODEBOOKS if exhaustive else SHORTLIST,
            KNEE,
            EDGE,
            REACH,
            search.edge,
            search.unit,
            *(array.ctypes.data for array in self._arrays),
            len(SCALE_STEPS),
        )
        self.pointer = ctypes.byref(self._struct)


def ranks(errors: torch.Tensor) -> npt.NDArray[np.uint16]:
    """Return squared errors as ranks, uint16 of the same shape."""
    return (errors * RANKS_PER_UNIT).round().clamp(max=WORST_RANK).numpy().astype(np.uint16)


def path_ranks(search: CodebookSearch) -> npt.NDArray[np.uint16]:
    """Rank the best way from each state to each, uint16 [bins, 8, 2, 2, 32]: the last is within 32 codebooks."""
    centers = bin_centers(PATH_BINS, "cpu")
    # Codebook, state, pair of codes, next state.
    levels = search.levels.reshape(CODEBOOKS, SCALAR_STATES, -1, SCALAR_STATES)
    errors = (centers[:, None, None, None, None] - levels).square().amin(3)
    return ranks(errors.unflatten(1, (-1, TOGETHER)).movedim(2, -1))
