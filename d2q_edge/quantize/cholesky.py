"""Compute the upper Cholesky factor U of the inverse Hessian, and triangular products that skip the zeros.

GPTQ (arXiv 2210.17323) inverts H and factors the inverse. With J the exchange matrix, J H J = L L^T gives
U = J inv(L) J directly: one Cholesky factorization and one triangular inverse, several times as fast and more accurate.
"""

import torch

from d2q_edge.errors import D2QError
from d2q_edge.quantize import matmul
from d2q_edge.quantize.collective import SINGLE_PROCESS, Collective
from d2q_edge.quantize.matmul import product, with_float64

STRIP = 1024
"""Columns that are computed at a time, without the zeros beyond them."""


def inverse_cholesky(
    hessian: torch.Tensor, damping: float, processes: Collective = SINGLE_PROCESS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return U, upper triangular float32 [n, n], with U^T U = inv(H + d I), and d, float32 [].

    Args:
        hessian: H, symmetric, float32 [n, n].
        damping: d as a share of the mean of diag(H). Where float32 fails, float64 follows, then ten times the damping.
        processes: share the work; all of them call this.

    Raises:
        D2QError: H isn't positive definite even in float64 with ten times the damping.
    """
    mean = hessian.diagonal().mean()
    for dtype, share in ((torch.float32, damping), (torch.float64, damping), (torch.float64, 10 * damping)):
        exchanged = hessian.flip(0, 1)
        exchanged = exchanged if dtype == torch.float32 else with_float64(exchanged).to(dtype)
        exchanged.diagonal().add_((share * mean).to(exchanged.device))
        lower, failed = torch.linalg.cholesky_ex(exchanged)
        del exchanged
        # All processes must go on in the same precision.
        processes.all_reduce([failed])
        if not failed:
            U = inverse_lower(lower, processes).flip(0, 1).to(hessian)
            if bool(U.isfinite().all()):
                return U, share * mean
    raise D2QError(
        "the calibration statistics of a layer can't be factored; use more or more varied --calibration text"
    )


def inverse_lower(lower: torch.Tensor, processes: Collective = SINGLE_PROCESS) -> torch.Tensor:
    """Return the inverse of a lower triangular matrix [n, n].

    On an accelerator by inv([[A, 0], [B, C]]) = [[inv(A), 0], [-inv(C) B inv(A), inv(C)]], which is nearly all matrix
    products and several times as fast as a triangular solver.
    """
    size = len(lower)
    inverse = torch.zeros_like(lower)
    cuts = strips(size)
    if len(cuts) == 1 or not matmul.is_accelerator(lower.device):
        for cut in cuts:
            inverse[cut.start :, cut] = inverse_columns(lower, cut)
        return inverse
    middle = (len(cuts) + 1) // 2 * STRIP
    halves = first, second = slice(0, middle), slice(middle, size)
    processes.compute_sharded(
        [inverse[half, half] for half in halves],
        [middle, size - middle],
        lambda index: inverse_lower(lower[halves[index], halves[index]]),
    )
    # The transposed inverses are upper triangular.
    beside = times_upper_transposed(lower[second, first], inverse[first, first].T, processes)
    inverse[second, first] = -times_upper(beside.T, inverse[second, second].T, processes).T
    return inverse


def inverse_columns(lower: torch.Tensor, columns: slice) -> torch.Tensor:
    """Solve for some columns of the inverse of a lower triangle [n, n], from their first nonzero row on."""
    start, stop = columns.start, columns.stop
    unit = torch.zeros(len(lower) - start, stop - start, dtype=lower.dtype, device=lower.device)
    unit.diagonal().fill_(1)
    solved: torch.Tensor = torch.linalg.solve_triangular(lower[start:, start:], unit, upper=False)
    return solved


def times_upper(left: torch.Tensor, upper: torch.Tensor, processes: Collective = SINGLE_PROCESS) -> torch.Tensor:
    """Return left @ upper, [m, n] times upper triangular [n, n]."""
    result, cuts = torch.empty_like(left), strips(len(upper))
    processes.compute_sharded(
        [result[:, cut] for cut in cuts],
        [cut.stop * (cut.stop - cut.start) for cut in cuts],
        lambda index: product(left[:, : cuts[index].stop], upper[: cuts[index].stop, cuts[index]]),
    )
    return result


def times_upper_transposed(
    left: torch.Tensor, upper: torch.Tensor, processes: Collective = SINGLE_PROCESS
) -> torch.Tensor:
    """Return left @ upper^T, [m, n] times the transpose of upper triangular [n, n]."""
    result, cuts = torch.empty_like(left), strips(len(upper))
    processes.compute_sharded(
        [result[:, cut] for cut in cuts],
        [(len(upper) - cut.start) * (cut.stop - cut.start) for cut in cuts],
        lambda index: product(left[:, cuts[index].start :], upper[cuts[index], cuts[index].start :].T),
    )
    return result


def upper_times_upper(left: torch.Tensor, right: torch.Tensor, processes: Collective = SINGLE_PROCESS) -> torch.Tensor:
    """Return left @ right, both upper triangular [n, n]."""
    result, cuts = torch.zeros_like(left), strips(len(right))
    processes.compute_sharded(
        [result[: cut.stop, cut] for cut in cuts],
        [cut.stop**2 * (cut.stop - cut.start) for cut in cuts],
        lambda index: product(left[: cuts[index].stop, : cuts[index].stop], right[: cuts[index].stop, cuts[index]]),
    )
    return result


def strips(size: int) -> list[slice]:
    """Cut that many columns into strips."""
    return [slice(start, min(start + STRIP, size)) for start in range(0, size, STRIP)]
