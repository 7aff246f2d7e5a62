"""The paper's own recipe for one layer: GPTQ and GPTAQ one column at a time over the grids of paper_grid.py.

Knows one matrix and the statistics of its input. This is the yardstick that gptaq.py, with our codebooks, is compared
with (DESIGN section 3, "Paper recipe"): it yields dequantized weights in torch and is never exported. The formulas of
the feedback, U and P, are those of gptaq.py. Groups of columns are visited in descending order of their largest
diag(H), and so are the columns of a group, whose grid is fitted when the group is reached.
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
"""Finds the grid of a group's weights [rows, group]."""


def round_groups(weights: torch.Tensor, fit: Fit) -> torch.Tensor:
    """Round a matrix to the nearest values of its groups' grids, without feedback.

    Args:
        weights: float32 [rows, columns].
        fit: the grid.
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
        fit: the grid.
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
    """DAC (the paper's section 3.3): the mean over tokens of teacher less student, both as batches [..., channels]."""
    return _mean(teacher) - _mean(student)


def _mean(batches: Iterable[torch.Tensor]) -> torch.Tensor:
    flat = [batch.reshape(-1, batch.shape[-1]) for batch in batches]
    return torch.stack([batch.sum(0) for batch in flat]).sum(0) / sum(len(batch) for batch in flat)


def _quantize_group(
    weights: torch.Tensor, U: torch.Tensor, P: torch.Tensor | None, fit: Fit
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize one group [rows, group]: the rounded weights, the errors E, and the weights as they were rounded.

    The loop over columns is nothing but a few small kernels per column, so everything else happens before it: with
    column scales c, it runs on w / c, and U and P are scaled to match.
    """
    grid = fit(weights)
    columns = torch.ones_like(weights[0]) if grid.columns is None else grid.columns
    # Columns are rows here: contiguous.
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
    """Columns in the order of quantization, int64 [columns]."""
    importance, inside = diagonal.view(-1, size).sort(dim=1, descending=True, stable=True)
    groups = importance[:, 0].argsort(descending=True, stable=True)
    return (inside + size * torch.arange(len(inside), device=diagonal.device)[:, None])[groups].reshape(-1)
