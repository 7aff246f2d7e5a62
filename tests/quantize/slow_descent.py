"""The moves of coordinate descent, written from their definitions in float64, one row at a time."""

import numpy as np
import numpy.typing as npt

from d2q_edge.formats.codebooks import PAIR_TABLE, SCALAR_TABLE
from d2q_edge.formats.tensor_types import TensorType, entries
from d2q_edge.quantize.quantized_layer import QuantizedLayer
from tests.quantize.slow_trellis import best_path, nearest_errors

Matrix = npt.NDArray[np.float64]


def least_squares(kind: TensorType, layer: QuantizedLayer, h: Matrix, t: Matrix, first: int = 0) -> Matrix:
    """The best scales [rows, blocks] of these codes, of the blocks from `first` on; those before count for nothing."""
    units = entries(kind, layer.codebooks.numpy(), layer.codes.numpy()).astype(np.float64)
    root = np.linalg.cholesky(h).T
    result = np.zeros(layer.scales.shape)
    for row, target in enumerate(t):
        blocks = units[row].reshape(-1, kind.block_size)
        spread = np.zeros((len(target), len(blocks)))
        for index in range(first, len(blocks)):
            spread[index * kind.block_size : (index + 1) * kind.block_size, index] = blocks[index]
        result[row] = np.linalg.lstsq(root @ spread, root @ target)[0]
    return result


def slow_nearest(kind: TensorType, target: Matrix) -> int:
    """The codebook with the least squared error, by trying all; target [32] in units of d."""
    levels = _levels(kind)
    if kind.windowed:
        return int(nearest_errors(target, levels[:, :, 0]).argmin())
    points = target.reshape(2, 16).T if kind.paired else target[:, None]
    distances = np.square(points[None, :, None] - levels[:, None]).sum(3).min(2).sum(1)
    return int(distances.argmin())


def slow_feedback(kind: TensorType, target: Matrix, codebook: int, h: Matrix) -> Matrix:
    """Units [32] of one group: every code is the nearest entry for what remains, whose optimum then moves.

    With some weights fixed at an error e, the best of the others is their target + inv(H_oo) H_of e.
    """
    levels = _levels(kind)[codebook]
    if kind.windowed:
        return _slow_paths(target, levels[:, 0], h)
    codes = [[i, i + 16] for i in range(16)] if kind.paired else [[i] for i in range(32)]
    result = np.zeros(32)
    fixed: list[int] = []
    for code in codes:
        rest = [column for column in range(32) if column not in fixed]
        error = target[fixed] - result[fixed]
        now = target.copy()
        now[rest] += np.linalg.solve(h[np.ix_(rest, rest)], h[np.ix_(rest, fixed)] @ error)
        # The error of an entry when all later weights follow freely: the Schur complement of H.
        places = [rest.index(column) for column in code]
        corner = np.linalg.inv(np.linalg.inv(h[np.ix_(rest, rest)])[np.ix_(places, places)])
        off = levels - now[code]
        result[code] = levels[((off @ corner) * off).sum(1).argmin()]
        fixed += code
    return result


def _slow_paths(target: Matrix, levels: Matrix, h: Matrix) -> Matrix:
    """The same where an entry depends on the code before: the cheapest path of both chains."""

    def optimum(result: Matrix, column: int) -> float:
        fixed, rest = slice(0, column), slice(column, None)
        moved = np.linalg.solve(h[rest, rest], h[rest, fixed] @ (target[fixed] - result[fixed]))
        return float(target[column] + moved[0])

    def cost(result: Matrix, column: int, entry: float) -> float:
        corner = 1 / np.linalg.inv(h[column:, column:])[0, 0]
        return float((entry - optimum(result, column)) ** 2 * corner)

    def follow(result: Matrix, column: int, entry: float) -> Matrix:
        after = result.copy()
        after[column] = entry
        return after

    result = np.zeros(32)
    for first in (0, 16):
        _, result = best_path(result, range(first, first + 16), levels, cost, follow)
    return result


def _levels(kind: TensorType) -> Matrix:
    """Entries in units of d: [codebooks, entries, 1 or 2]."""
    if not kind.has_codebooks:
        return np.stack([np.arange(-8.0, 8.0), np.arange(-7.0, 9.0)])[:, :, None]
    return (PAIR_TABLE if kind.paired else SCALAR_TABLE[:, :, None]).astype(np.float64)
