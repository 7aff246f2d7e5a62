"""The paper's recipe for one layer: GPTQ and GPTAQ column by column over the grids of grid.py (arXiv 2602.02546).

U and P are those of quantize/gptaq.py. Groups of columns are visited in descending order of their largest diag(H), and
so are the columns of a group, whose grid is fitted when the group is reached. The result is dequantized weights.
"""

from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch

from d2q_edge.quantize.gptaq import DAMPING, Feedback
from d2q_edge.quantize.statistics import InputStatistics
from tools.paper_recipe.grid import Grid, group_size

ALPHA = 0.25
"""Weight of the input's error in the paper."""
Fit: TypeAlias = Callable[[torch.Tensor], Grid]
"""Fits the grid of a group's weights [rows, group]."""


def round_groups(weights: torch.Tensor, fit: Fit) -> torch.Tensor:
    """Round a matrix to the nearest values of its groups' grids, without feedback.

    Args:
        weights: float32 [rows, columns].
        fit: fits the grid of a group.
    """
    parts = weights.split(group_size(weights.shape[1]), dim=1)
    return torch.cat([fit(part).round(part) for part in parts], dim=1)


def quantize_columns(
    weights: torch.Tensor, statistics: InputStatistics, fit: Fit, alpha: float = ALPHA, damping: float = DAMPING
) -> torch.Tensor:
    """Quantize a matrix with error feedback.

    Args:
        weights: float32 [rows, columns].
        statistics: of the layer's input.
        fit: fits the grid of a group.
        alpha: weight of the input's error; 0 is plain GPTQ.
        damping: share of the mean of diag(H) that is added to the diagonal.

    Returns:
        float32 [rows, columns], the dequantized matrix.

    Raises:
        D2QError: the Hessian can't be factored even in double precision with strong damping.
    """
    size = group_size(weights.shape[1])
    feedback = Feedback.compute(statistics, lambda diagonal: _processing_order(diagonal, size), alpha, damping)
    U, P = feedback.U, feedback.P
    work = feedback.permute(weights)
    result = torch.empty_like(weights)
    for start in range(0, weights.shape[1], size):
        stop = start + size
        here = slice(start, stop)
        group_P = None if P is None else P[here, here]
        rounded, errors, compensated = _quantize_group(work[:, here], U[here, here], group_P, fit)
        work[:, stop:] -= errors @ U[here, stop:]
        if P is not None:
            work[:, stop:] += compensated @ P[here, stop:]
        result[:, feedback.order[here]] = rounded
    return result


def mean_shift(teacher: Iterable[torch.Tensor], student: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the bias of DAC (section 3.3 of the paper): the mean of teacher - student over tokens.

    Args:
        teacher, student: batches of the norm's outputs, float32 [..., channels].
    """
    return _mean(teacher) - _mean(student)


def _mean(batches: Iterable[torch.Tensor]) -> torch.Tensor:
    flat = [batch.reshape(-1, batch.shape[-1]) for batch in batches]
    return torch.stack([batch.sum(0) for batch in flat]).sum(0) / sum(len(batch) for batch in flat)


def _quantize_group(
    weights: torch.Tensor, U: torch.Tensor, P: torch.Tensor | None, fit: Fit
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize one group [rows, group]; return the rounded weights, the errors E, and the weights as they were rounded.

    With column scales c the loop runs on w / c, with U and P scaled to match, so that it has few kernels per column.
    """
    grid = fit(weights)
    columns = torch.ones_like(weights[0]) if grid.columns is None else grid.columns
    # Transposed, so that a column is contiguous.
    work = (weights / columns).T.contiguous()
    rounded, errors = torch.empty_like(work), torch.empty_like(work)
    U = U / columns
    inverse = 1 / U.diagonal()
    P = None if P is None else columns[:, None] * P / columns
    thresholds = grid.thresholds
    for column in range(len(work)):
        target, error = work[column], errors[column]
        codes = torch.searchsorted(thresholds, target[:, None])
        torch.gather(grid.levels, 1, codes, out=rounded[column].unsqueeze(1))
        torch.mul(target - rounded[column], inverse[column], out=error)
        later = work[column + 1 :]
        later.addr_(U[column, column + 1 :], error, alpha=-1)
        if P is not None:
            later.addr_(P[column, column + 1 :], target)
    return (rounded * columns[:, None]).T, errors.T, (work * columns[:, None]).T


def _processing_order(diagonal: torch.Tensor, size: int) -> torch.Tensor:
    """Order the columns for quantization: int64 [columns]."""
    importance, inside = diagonal.view(-1, size).sort(dim=1, descending=True, stable=True)
    groups = importance[:, 0].argsort(descending=True, stable=True)
    return (inside + size * torch.arange(len(inside), device=diagonal.device)[:, None])[groups].reshape(-1)
