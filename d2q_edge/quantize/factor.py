"""U of gptaq.py, the upper triangle with U^T U = inv(H), and products that leave out its zeros.

With J the exchange of first and last, J H J = L L^T gives U = J inv(L) J: one Cholesky factorization and the inverse of
a triangle, where inverting H and factoring the inverse (GPTQ, arXiv 2210.17323) takes several times as long and loses
more digits. Knows matrices only.
"""

import torch

from d2q_edge.errors import D2QError
from d2q_edge.quantize.precision import product

STRIP = 1024
"""Columns, or rows, that are computed at a time: the zeros beyond a strip cost nothing."""


def inverse_factor(hessian: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """U with U^T U = inv(H + d I). In float32; float64, then more damping, where that fails.

    Args:
        hessian: H, symmetric, float32 [n, n].
        damping: d as a share of the mean of diag(H).

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
        if failed:
            continue
        factor = inverse_lower(lower).flip(0, 1).float()
        if bool(factor.isfinite().all()):
            return factor, share * mean
    raise D2QError(
        "the calibration statistics of a layer can't be factored; use more or more varied --calibration text"
    )


def inverse_lower(lower: torch.Tensor) -> torch.Tensor:
    """The inverse of a lower triangle [n, n]."""
    size = len(lower)
    inverse = torch.zeros_like(lower)
    for start, stop in _strips(size):
        unit = torch.zeros(size - start, stop - start, dtype=lower.dtype, device=lower.device)
        unit.diagonal().fill_(1)
        inverse[start:, start:stop] = torch.linalg.solve_triangular(lower[start:, start:], unit, upper=False)
    return inverse


def times_upper(left: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
    """left [m, n] @ upper [n, n]."""
    result = torch.empty_like(left)
    for start, stop in _strips(len(upper)):
        result[:, start:stop] = product(left[:, :stop], upper[:stop, start:stop])
    return result


def times_upper_transposed(left: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
    """left [m, n] @ upper^T [n, n]."""
    result = torch.empty_like(left)
    for start, stop in _strips(len(upper)):
        result[:, start:stop] = product(left[:, start:], upper[start:stop, start:].T)
    return result


def upper_times_upper(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right, both upper triangles [n, n]."""
    result = torch.zeros_like(left)
    for start, stop in _strips(len(right)):
        result[:stop, start:stop] = product(left[:stop, :stop], right[:stop, start:stop])
    return result


def _strips(size: int) -> list[tuple[int, int]]:
    return [(start, min(start + STRIP, size)) for start in range(0, size, STRIP)]
