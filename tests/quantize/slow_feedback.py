"""Error feedback inside a group from its definition in float64, one row and one column at a time."""

import numpy as np
import numpy.typing as npt

from tests.quantize.slow_trellis import best_path

F64 = npt.NDArray[np.float64]


def slow_group(w: F64, levels: F64, u: F64, p: F64, width: int, *, windowed: bool) -> tuple[list[int], F64, F64, F64]:
    """Return codes, quantized weights [32], errors [32], and the weights [32] as they were quantized.

    Args:
        w: the weights of one row, columns of a code side by side.
        levels: of the row's codebook, times its scale, [K, V].
        u, p: U and P of these columns.
        width: V.
        windowed: whether an entry also depends on the code before.
    """
    w = w.copy()
    if windowed:
        return _slow_paths(w, levels[:, 0], u, p)
    codes, quantized, errors = [], np.zeros(32), np.zeros(32)
    for first in range(0, 32, width):
        j = np.arange(first, first + width)
        inverse = np.linalg.inv(u[np.ix_(j, j)])
        costs = [float((((w[j] - level) @ inverse) ** 2).sum()) for level in levels]
        codes.append(int(np.argmin(costs)))
        quantized[j] = levels[codes[-1]]
        errors[j] = (w[j] - quantized[j]) @ inverse
        later = np.arange(first + width, 32)
        w[later] += w[j] @ p[np.ix_(j, later)] - errors[j] @ u[np.ix_(j, later)]
    return codes, quantized, errors, w


def _slow_paths(w: F64, levels: F64, u: F64, p: F64) -> tuple[list[int], F64, F64, F64]:
    def follow(carried: F64, column: int, entry: float) -> F64:
        seen = carried.copy()
        error = (seen[column] - entry) / u[column, column]
        seen[column + 1 :] += seen[column] * p[column, column + 1 :] - error * u[column, column + 1 :]
        return seen

    def cost(carried: F64, column: int, entry: float) -> float:
        return float(((carried[column] - entry) / u[column, column]) ** 2)

    codes: list[int] = []
    for first in (0, 16):
        chain, w = best_path(w, range(first, first + 16), levels, cost, follow)
        codes += chain
    quantized = np.array([levels[code + 8 * (codes[j - 1] % 2 if j % 16 else 0)] for j, code in enumerate(codes)])
    return codes, quantized, (w - quantized) / u.diagonal(), w
