"""U of gptaq.py, the upper triangle with U^T U = inv(H), and products that leave out its zeros.

With J the exchange of first and last, J H J = L L^T gives U = J inv(L) J: one Cholesky factorization and the inverse of
a triangle, where inverting H and factoring the inverse (GPTQ, arXiv 2210.17323) takes several times as long and loses
more digits. Knows matrices only, and that processes share what takes long: all call the same function with the same
matrices, and every strip is one's.
"""

import torch

from d2q_edge.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from d2q_edge.errors import D2QError
from d2q_edge.quantize.matmul import prefers_products, product

STRIP = 1024
"""Columns, or rows, that are computed at a time: the zeros beyond a strip cost nothing."""


def inverse_factor(
    hessian: torch.Tensor, damping: float, processes: ProcessGroup = SINGLE_PROCESS
) -> tuple[torch.Tensor, torch.Tensor]:
    """U with U^T U = inv(H + d I). In float32; float64, then more damping, where that fails.

    Args:
        hessian: H, symmetric, float32 [n, n].
        damping: d as a share of the mean of diag(H).
        processes: the processes that share the work; all of them call this.

    Returns:
        U, float32 [n, n], and d, float32 [].

    Raises:
        D2QError: it can't be factored even in double precision with ten times the damping, or it is zero.
    """
    mean = hessian.diagonal().mean()
    for dtype, share in ((torch.float32, damping), (torch.float64, damping), (torch.float64, 10 * damping)):
        exchanged = hessian.flip(0, 1).to(dtype)
        exchanged.diagonal().add_(share * mean)
        lower, failed = torch.linalg.cholesky_ex(exchanged)
        del exchanged
        # All go on in the same precision.
        processes.all_reduce([failed])
        if failed:
            continue
        factor = inverse_lower(lower, processes).flip(0, 1).float()
        if bool(factor.isfinite().all()):
            return factor, share * mean
    raise D2QError(
        "the calibration statistics of a layer can't be factored; use more or more varied --calibration text"
    )


def inverse_lower(lower: torch.Tensor, processes: ProcessGroup = SINGLE_PROCESS) -> torch.Tensor:
    """The inverse of a lower triangle [n, n].

    That of [[A, 0], [B, C]] is [[inv(A), 0], [-inv(C) B inv(A), inv(C)]], so that nearly all of it is matrix products;
    a solver takes several times as long on a GPU. A CPU has a quick one.
    """
    size = len(lower)
    inverse = torch.zeros_like(lower)
    if size <= STRIP or not prefers_products(lower.device):
        for start, stop in strips(size):
            inverse[start:, start:stop] = solved_columns(lower, start, stop)
        return inverse
    cut = (len(strips(size)) + 1) // 2 * STRIP
    first, second = slice(0, cut), slice(cut, size)
    processes.compute_sharded(
        [inverse[half, half] for half in (first, second)],
        [cut, size - cut],
        lambda number: inverse_lower(lower[(first, second)[number], (first, second)[number]]),
    )
    # The transposes of the inverses are upper triangles.
    beside = times_upper_transposed(lower[second, first], inverse[first, first].T, processes)
    inverse[second, first] = -times_upper(beside.T, inverse[second, second].T, processes).T
    return inverse


def solved_columns(lower: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Columns of the inverse of a lower triangle [n, n] from a solver, without the zeros: [n - start, stop - start]."""
    unit = torch.zeros(len(lower) - start, stop - start, dtype=lower.dtype, device=lower.device)
    unit.diagonal().fill_(1)
    columns: torch.Tensor = torch.linalg.solve_triangular(lower[start:, start:], unit, upper=False)
    return columns


def times_upper(left: torch.Tensor, upper: torch.Tensor, processes: ProcessGroup = SINGLE_PROCESS) -> torch.Tensor:
    """left [m, n] @ upper [n, n]."""
    result, cuts = torch.empty_like(left), strips(len(upper))

    def columns(number: int) -> torch.Tensor:
        start, stop = cuts[number]
        return product(left[:, :stop], upper[:stop, start:stop])

    costs = [stop * (stop - start) for start, stop in cuts]
    processes.compute_sharded([result[:, start:stop] for start, stop in cuts], costs, columns)
    return result


def times_upper_transposed(
    left: torch.Tensor, upper: torch.Tensor, processes: ProcessGroup = SINGLE_PROCESS
) -> torch.Tensor:
    """left [m, n] @ upper^T [n, n]."""
    result, cuts = torch.empty_like(left), strips(len(upper))

    def columns(number: int) -> torch.Tensor:
        start, stop = cuts[number]
        return product(left[:, start:], upper[start:stop, start:].T)

    costs = [(len(upper) - start) * (stop - start) for start, stop in cuts]
    processes.compute_sharded([result[:, start:stop] for start, stop in cuts], costs, columns)
    return result


def upper_times_upper(
    left: torch.Tensor, right: torch.Tensor, processes: ProcessGroup = SINGLE_PROCESS
) -> torch.Tensor:
    """left @ right, both upper triangles [n, n]."""
    result, cuts = torch.zeros_like(left), strips(len(right))

    def columns(number: int) -> torch.Tensor:
        start, stop = cuts[number]
        return product(left[:stop, :stop], right[:stop, start:stop])

    costs = [stop**2 * (stop - start) for start, stop in cuts]
    processes.compute_sharded([result[:stop, start:stop] for start, stop in cuts], costs, columns)
    return result


def strips(size: int) -> list[tuple[int, int]]:
    """Where each strip of so many columns begins and ends."""
    return [(start, min(start + STRIP, size)) for start in range(0, size, STRIP)]
