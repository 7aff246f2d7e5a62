"""The paper's column-wise GPTAQ against a slow float64 version, one row and one column at a time."""

from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
import torch

from d2q_edge.errors import D2QError
from d2q_edge.quantize.statistics import InputStatistics
from tests.quantize.test_gptaq import problem, statistics_of
from tools.paper_recipe.feedback import Fit, mean_shift, quantize_columns, round_groups
from tools.paper_recipe.grid import Grid, clipped_grid, dual_scale_grid

Matrix = npt.NDArray[np.float64]
AFFINE, DUAL = partial(clipped_grid, bits=2), partial(dual_scale_grid, bits=2)


def slow_gptaq(weights: Matrix, x: Matrix, original: Matrix, fit: Fit, size: int, alpha: float) -> Matrix:
    """All columns after one are updated at once, with no blocks and no transposes; only the grid's fit is shared."""
    rows, columns = weights.shape
    h = 2 / len(x) * x.T @ x
    d = 2 / len(x) * (original - x).T @ x
    groups = [list(range(start, start + size)) for start in range(0, columns, size)]
    for group in groups:
        group.sort(key=lambda column: -h[column, column])
    groups.sort(key=lambda group: -h[group[0], group[0]])
    order = [column for group in groups for column in group]
    h, d = h[np.ix_(order, order)], d[np.ix_(order, order)]
    u = np.linalg.cholesky(np.linalg.inv(h + 0.01 * h.diagonal().mean() * np.eye(columns))).T
    p = alpha * np.triu(d @ u.T, 1) @ u
    w = weights[:, order].copy()
    q = np.empty_like(w)
    for j in range(columns):
        if j % size == 0:
            grid = fit(torch.tensor(w[:, j : j + size]))
        c = 1.0 if grid.columns is None else float(grid.columns[j % size])
        for i in range(rows):
            target = w[i, j]
            values = c * grid.levels[i].numpy()
            q[i, j] = values[np.argmin(abs(values - target))]
            w[i, j + 1 :] += target * p[j, j + 1 :] - (target - q[i, j]) / u[j, j] * u[j, j + 1 :]
    undone = np.empty_like(q)
    undone[:, order] = q
    return undone


@pytest.mark.parametrize("alpha", [0.0, 0.25])
@pytest.mark.parametrize("fit", [AFFINE, DUAL], ids=["affine", "dual"])
@pytest.mark.parametrize("columns", [256, 96], ids=["two groups of 128", "three of 32"])
def test_against_the_slow_version(fit: Fit, alpha: float, columns: int) -> None:
    weights, original, perturbed = problem(columns)
    found = quantize_columns(weights, statistics_of(original, perturbed), fit, alpha)
    size = 128 if columns == 256 else 32
    x, y = perturbed.double().numpy(), original.double().numpy()
    expected = slow_gptaq(weights.double().numpy(), x, y, fit, size, alpha)
    # float32 decides a near tie otherwise now and then, and the rest of that row follows; most rows agree entirely.
    same = np.isclose(found, expected, rtol=1e-3, atol=1e-5).all(axis=1)
    assert same.mean() > 0.7


def two_columns(difference: float) -> InputStatistics:
    """H = [[2, 1], [1, 1]], so that U = [[1, -1], [0, 1]]; dXXT = [[0, difference], [0, 0]], so that P = alpha dXXT."""
    x = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    statistics = InputStatistics(2)
    statistics.add_batch(x, x + difference * torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    torch.testing.assert_close(statistics.hessian, torch.tensor([[2.0, 1.0], [1.0, 1.0]]))
    torch.testing.assert_close(statistics.dXXT, torch.tensor([[0.0, difference], [0.0, 0.0]]))
    return statistics


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        # 0.9 rounds up to 1; the error -0.1 takes 0.1 off 0.55, which then rounds down.
        (0.0, [1.0, 0.0]),
        # P gives 0.25 * 0.9 * 1 back: 0.675 rounds up.
        (0.25, [1.0, 1.0]),
    ],
)
def test_by_hand(alpha: float, expected: list[float]) -> None:
    def fit(weights: torch.Tensor) -> Grid:
        return Grid(torch.tensor([[0.0, 1.0]]).expand(len(weights), -1))

    weights = torch.tensor([[0.9, 0.55]])
    found = quantize_columns(weights, two_columns(1.0), fit, alpha, damping=0.0)
    torch.testing.assert_close(found, torch.tensor([expected]))
    torch.testing.assert_close(round_groups(weights, fit), torch.tensor([[1.0, 1.0]]))


@pytest.mark.parametrize(("alpha", "expected"), [(0.0, [1.0, 0.0]), (0.25, [1.0, 1.0])])
def test_by_hand_with_column_scales(alpha: float, expected: list[float]) -> None:
    """The same case, with weights multiplied and inputs divided by the grid's column scales."""
    c = torch.tensor([0.5, 2.0])

    def fit(weights: torch.Tensor) -> Grid:
        return Grid(torch.tensor([[0.0, 1.0]]).expand(len(weights), -1), c)

    x = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    statistics = InputStatistics(2)
    statistics.add_batch(x / c, (x + torch.tensor([[-1.0, 0.0], [1.0, 0.0]])) / c)
    found = quantize_columns(torch.tensor([[0.9, 0.55]]) * c, statistics, fit, alpha, damping=0.0)
    torch.testing.assert_close(found, torch.tensor([expected]) * c)


@pytest.mark.parametrize("fit", [AFFINE, DUAL], ids=["affine", "dual"])
def test_each_step_pays(fit: Fit) -> None:
    """The error of the outputs, |X~ W - X Q|: rounding > GPTQ > GPTAQ."""
    weights, original, perturbed = problem(256, rows=64)
    statistics = statistics_of(original, perturbed)

    def error(quantized: torch.Tensor) -> float:
        return float((original @ weights.T - perturbed @ quantized.T).square().mean())

    rounded = error(round_groups(weights, fit))
    gptq = error(quantize_columns(weights, statistics, fit, alpha=0))
    gptaq = error(quantize_columns(weights, statistics, fit, alpha=1))
    assert gptq < 0.9 * rounded
    assert gptaq < 0.99 * gptq
    default = quantize_columns(weights, statistics, fit)
    torch.testing.assert_close(default, quantize_columns(weights, statistics, fit, alpha=0.25), rtol=0, atol=0)


@pytest.mark.parametrize("fit", [AFFINE, DUAL], ids=["affine", "dual"])
def test_dead_columns_become_zero(fit: Fit) -> None:
    weights, original, perturbed = problem(256)
    original[:, 7] = perturbed[:, 7] = 0
    weights[:, 7] = 1000.0
    found = quantize_columns(weights, statistics_of(original, perturbed), fit)
    assert bool(found.isfinite().all())
    assert float(found[:, 7].abs().max()) < 1e-4
    assert float(found.abs().max()) < 1


def test_rounding_without_correlations_is_rounding_to_nearest() -> None:
    weights, _, _ = problem(256)
    plain = InputStatistics(256)
    plain.add_batch(torch.eye(256), torch.eye(256))
    torch.testing.assert_close(quantize_columns(weights, plain, AFFINE), round_groups(weights, AFFINE))


def test_damping_holds_feedback_back() -> None:
    weights, original, perturbed = problem(256)
    statistics = statistics_of(original, perturbed)
    damped = quantize_columns(weights, statistics, AFFINE, alpha=0, damping=1e9)
    torch.testing.assert_close(damped, round_groups(weights, AFFINE))
    assert not torch.allclose(quantize_columns(weights, statistics, AFFINE, alpha=0), damped, atol=1e-3)


def test_arguments_are_left_alone() -> None:
    weights, original, perturbed = problem(128)
    before = weights.clone()
    quantize_columns(weights, statistics_of(original, perturbed), DUAL)
    round_groups(weights, AFFINE)
    torch.testing.assert_close(weights, before, rtol=0, atol=0)


def test_hopeless_statistics_are_an_error() -> None:
    weights, original, _ = problem(128)
    original[0, 0] = torch.inf
    with pytest.raises(D2QError, match="can't be factored"):
        quantize_columns(weights, statistics_of(original, original), AFFINE)


def test_mean_shift() -> None:
    teacher = [torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[8.0, 0.0]]])]
    student = iter([torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([[3.0, 1.0]])])
    torch.testing.assert_close(mean_shift(teacher, student), torch.tensor([4.0 - 1.0, 2.0 - 1.0]))
