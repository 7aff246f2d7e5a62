"""The two grids of the paper's recipe (arXiv 2602.02546): the values that the weights of a group can take, row by row.

Most layers get a clipped min-max grid, down projections the Dual-Scale Quantizer (section 3.2 of the paper), whose
column scales all rows share.
"""

import math
from dataclasses import dataclass

import torch

CLIP_SHARES = tuple(1 - 0.02 * step for step in range(40))
"""Shares of the range from the least to the largest weight that are tried."""
CLIP_POWER = 2.4
"""The clip search minimizes the sum of |error| to this power."""
ITERATIONS = 15
"""Alternating least-squares steps of the dual-scale fit."""
COLUMN_TINY = 1e-6
"""Least column scale, relative to their mean, so that a column of zeros doesn't divide by zero."""
_RIDGE = 1e-6
"""Relative to the diagonal; the planes of a row are collinear where all of its weights have one code."""
CHUNK = 1 << 24
"""Weights times clip shares per step, which bounds memory."""
_NORMAL_LEVELS = {2: (0.4528, 1.5104), 3: (0.2451, 0.7560, 1.3440, 2.1520)}
"""Positive half of the best levels for a unit Gaussian (Max, 1960), where the fit starts."""


@dataclass(frozen=True)
class Grid:
    """The values of one group: W[i, j] = columns[j] * levels[i, code].

    Attributes:
        levels: [rows, K], ascending in every row.
        columns: [columns], positive; None where they are all 1.
    """

    levels: torch.Tensor
    columns: torch.Tensor | None = None

    @property
    def thresholds(self) -> torch.Tensor:
        """The midpoints of neighboring levels, [rows, K - 1]."""
        return (self.levels[:, 1:] + self.levels[:, :-1]) / 2

    def round(self, weights: torch.Tensor) -> torch.Tensor:
        """Round weights [rows, columns] to the nearest values."""
        scaled = weights if self.columns is None else weights / self.columns
        rounded = self.levels.gather(1, torch.searchsorted(self.thresholds, scaled.contiguous()))
        return rounded if self.columns is None else rounded * self.columns


def clipped_grid(weights: torch.Tensor, bits: int, *, chunk: int = CHUNK) -> Grid:
    """Fit the asymmetric grid step * (0 .. 2^bits - 1, less an integer zero point) of each row, with the best clipping.

    The zero point makes zero a level. It follows from the whole range and stays when the range is clipped.

    Args:
        weights: floating point [rows, columns] of one group.
        bits: per weight.
        chunk: weights times clip shares per step.
    """
    top = 2**bits - 1
    low, high = weights.amin(1, keepdim=True).clamp(max=0), weights.amax(1, keepdim=True).clamp(min=0)
    step = ((high - low) / top).clamp(min=torch.finfo(weights.dtype).tiny)
    zero = (-low / step).round()
    shares = weights.new_tensor(CLIP_SHARES)
    rows = max(1, chunk // (weights.shape[1] * len(shares)))
    parts = zip(weights.split(rows), step.split(rows), zero.split(rows), strict=True)
    best = torch.cat([_clip_errors(*part, top, shares).argmin(0) for part in parts])
    return Grid(step * shares[best, None] * (torch.arange(top + 1, device=weights.device) - zero))


def _clip_errors(
    weights: torch.Tensor, step: torch.Tensor, zero: torch.Tensor, top: int, shares: torch.Tensor
) -> torch.Tensor:
    """Return the error of every row with every share: [shares, rows]."""
    steps = step * shares[:, None, None]
    rounded = (weights / steps).add_(zero).round_().clamp_(0, top).sub_(zero).mul_(steps)
    return rounded.sub_(weights).abs_().pow_(CLIP_POWER).sum(2)


def dual_scale_grid(weights: torch.Tensor, bits: int, iterations: int = ITERATIONS) -> Grid:
    """Fit column scales c and levels r0 B0 + r1 B1 (+ r2 B2), B = +-1, of each row by alternating least squares.

    From c_j = mean_i |W_ij| and the codes for Gaussian rows, every step solves for all r of a row together, then for c,
    and then takes the nearest codes. No part of a step raises the squared error.

    Args:
        weights: floating point [rows, columns] of one group.
        bits: sign planes: 2 or 3.
        iterations: steps.
    """
    planes = _sign_patterns(bits, weights)
    columns = _normalized(weights.abs().mean(0))[0]
    half = weights.new_tensor(_NORMAL_LEVELS[bits])
    size = (weights.square().sum(1) / columns.square().sum()).sqrt()
    levels = size[:, None] * torch.cat([-half.flip(0), half])
    order = torch.arange(2**bits, device=weights.device).expand(len(weights), -1)
    ridge = _RIDGE * torch.eye(bits, dtype=weights.dtype, device=weights.device)
    for _ in range(iterations):
        codes = torch.searchsorted(Grid(levels).thresholds, weights / columns)
        signs = planes[order.gather(1, codes)]
        squares = columns.square()
        gram = (signs * squares[:, None]).mT @ signs + ridge * squares.sum()
        scales = torch.linalg.solve_ex(gram, signs.mT @ (weights * columns)[:, :, None])[0]
        fitted = (signs @ scales)[:, :, 0]
        columns = (weights * fitted).sum(0) / fitted.square().sum(0).clamp(min=torch.finfo(weights.dtype).tiny)
        columns, mean = _normalized(columns)
        levels, order = (scales[:, :, 0] @ planes.T * mean).sort(1)
    return Grid(levels, columns)


def _sign_patterns(bits: int, like: torch.Tensor) -> torch.Tensor:
    """Return all combinations of signs in ascending binary order, minus for 0: [2^bits, bits]."""
    sign = like.new_tensor([-1.0, 1.0])
    return torch.cartesian_prod(*[sign] * bits)


def _normalized(columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the column scales over their mean, and that mean; 1 where all of them are zero."""
    mean = columns.mean()
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    return (columns / mean).clamp(min=COLUMN_TINY), mean


def group_size(columns: int, wanted: int = 128) -> int:
    """Return the columns per group: `wanted`, or the largest power of two that divides the width."""
    return math.gcd(columns, wanted)
