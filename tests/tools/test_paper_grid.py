"""The paper's grids against slow float64 versions, one row and one weight at a time, and against hand-worked cases."""

import itertools

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tools.paper_recipe import grid as paper_grid
from tools.paper_recipe.grid import Grid, clipped_grid, dual_scale_grid, group_size

Matrix = npt.NDArray[np.float64]


def heavy_tailed(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Float64 weights whose columns and rows differ in size."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    sizes = torch.exp(0.5 * torch.randn(columns, generator=generator, dtype=torch.float64))
    return normal * sizes * torch.linspace(0.01, 2, rows, dtype=torch.float64)[:, None] + 0.01 * normal**3


def slow_clipped_levels(row: Matrix, bits: int) -> Matrix:
    """GPTQ's clip search: shrink the range, compute scale and zero point, keep the best."""
    top = 2**bits - 1
    low, high = min(row.min(), 0.0), max(row.max(), 0.0)
    best, kept = np.inf, np.zeros(top + 1)
    for percent in range(100, 20, -2):
        step = (high - low) * (percent / 100) / top
        zero = round(-low * (percent / 100) / step)
        levels = np.array([step * (code - zero) for code in range(top + 1)])
        error = sum(min(abs(levels - weight)) ** 2.4 for weight in row)
        if error < best:
            best, kept = error, levels
    return kept


@pytest.mark.parametrize("bits", [2, 3])
def test_clipped_grid_against_the_slow_version(bits: int) -> None:
    weights = heavy_tailed(12, 64)
    weights[3] = weights[3].abs()  # zero is an end of the range
    weights[4] = -weights[4].abs()
    weights[5, 0] = 100.0  # far outlier: clipped
    expected = np.stack([slow_clipped_levels(row, bits) for row in weights.numpy()])
    np.testing.assert_allclose(clipped_grid(weights, bits).levels, expected, rtol=1e-12, atol=1e-15)
    by_five_rows = clipped_grid(weights, bits, chunk=40 * 64 * 5)
    np.testing.assert_allclose(by_five_rows.levels, expected, rtol=1e-12, atol=1e-15)
    single = clipped_grid(weights.float(), bits).levels
    np.testing.assert_allclose(single, expected, rtol=1e-5, atol=1e-6)


def test_clipped_grid_by_hand() -> None:
    # Steps of 0.5 from -0.5: all weights are levels already.
    weights = torch.tensor([[-0.5, 0.0, 0.5, 1.0], [0.0, 0.0, 0.0, 0.0]])
    grid = clipped_grid(weights, 2)
    torch.testing.assert_close(grid.levels[0], torch.tensor([-0.5, 0.0, 0.5, 1.0]))
    torch.testing.assert_close(grid.round(weights), weights)


def test_the_strongest_clipping() -> None:
    """Many weights on the grid up to 2.2 outvote the one at 10."""
    weights = torch.cat([torch.arange(8000) % 3 * (2.2 / 3), torch.tensor([10.0])])
    torch.testing.assert_close(clipped_grid(weights[None], 2).levels, torch.arange(4)[None] * (2.2 / 3))


def slow_dual_scale(weights: Matrix, bits: int, iterations: int) -> tuple[Matrix, Matrix, list[float]]:
    """The rounded matrix, the column scales, and the squared error after every step."""
    rows, columns = weights.shape
    normal = {2: [0.4528, 1.5104], 3: [0.2451, 0.756, 1.344, 2.152]}[bits]
    patterns = [np.array(signs) for signs in itertools.product([-1.0, 1.0], repeat=bits)]
    c = np.array([np.mean([abs(weights[i, j]) for i in range(rows)]) for j in range(columns)])
    # Where the fit starts: the codes of Gaussian levels, as sign patterns in the order of the levels.
    signs = np.empty((rows, columns, bits))
    for i in range(rows):
        size = np.sqrt((weights[i] ** 2).sum() / (c**2).sum())
        levels = size * np.array([-level for level in reversed(normal)] + normal)
        for j in range(columns):
            signs[i, j] = patterns[int(np.argmin(abs(levels - weights[i, j] / c[j])))]
    errors = []
    rounded = np.empty_like(weights)
    for _ in range(iterations):
        r = [np.linalg.lstsq(signs[i] * c[:, None], weights[i], rcond=None)[0] for i in range(rows)]
        for j in range(columns):
            part = np.array([signs[i, j] @ r[i] for i in range(rows)])
            c[j] = (weights[:, j] @ part) / (part @ part)
        for i, j in itertools.product(range(rows), range(columns)):
            distances = [abs(weights[i, j] - c[j] * (pattern @ r[i])) for pattern in patterns]
            signs[i, j] = patterns[int(np.argmin(distances))]
            rounded[i, j] = c[j] * (signs[i, j] @ r[i])
        errors.append(float(((weights - rounded) ** 2).sum()))
    return rounded, c / c.mean(), errors


@pytest.mark.parametrize(("bits", "iterations"), [(2, 1), (2, 15), (3, 1), (3, 15)])
def test_dual_scale_grid_against_the_slow_version(bits: int, iterations: int) -> None:
    weights = heavy_tailed(6, 32, seed=bits)
    rounded, columns, errors = slow_dual_scale(weights.numpy().copy(), bits, iterations)
    grid = dual_scale_grid(weights, bits, iterations)
    assert grid.columns is not None
    np.testing.assert_allclose(grid.columns, columns, rtol=1e-4)
    np.testing.assert_allclose(grid.round(weights), rounded, rtol=1e-4, atol=1e-6)
    assert grid.levels.shape == (6, 2**bits)
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(errors))
    assert iterations == paper_grid.ITERATIONS or iterations == 1


def test_dual_scale_steps_never_make_it_worse() -> None:
    """Also where few large weights make r0 less than r1 + r2, so that the levels change their order."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.rand(40, 24, generator=generator)
    sizes = torch.where(kind < 0.05, 4.0, torch.where(kind < 0.3, 1.4, 0.7)).double()
    weights = sizes * torch.randn(40, 24, generator=generator).sign() + 0.01 * torch.randn(40, 24, generator=generator)
    grids = [dual_scale_grid(weights, 3, iterations) for iterations in range(1, 16)]
    errors = [float((grid.round(weights) - weights).square().sum()) for grid in grids]
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 0.1 * errors[0]


@pytest.mark.parametrize("bits", [2, 3])
def test_dual_scale_grid_has_the_form_of_the_paper(bits: int) -> None:
    """The levels of a row are all sums of +-r_b."""
    for levels in dual_scale_grid(heavy_tailed(20, 128), bits).levels.numpy():
        # The largest level is the sum of all r; the next two lack the smallest r, and the second smallest, twice.
        r = [(levels[-1] - levels[-1 - place]) / 2 for place in range(1, bits)]
        r.append(levels[-1] - sum(r))
        sums = [sum(signs) for signs in itertools.product(*((-value, value) for value in r))]
        np.testing.assert_allclose(levels, sorted(sums), atol=1e-9)


def test_dual_scale_grid_recovers_its_own_values() -> None:
    """A matrix that is c_j (+-r0 +-r1) already has no error."""
    generator = torch.Generator().manual_seed(5)
    signs = torch.randint(0, 2, (16, 64, 2), generator=generator).double() * 2 - 1
    r = torch.rand(16, 1, 1, generator=generator, dtype=torch.float64) + torch.tensor([1.0, 0.5])
    c = torch.rand(64, generator=generator, dtype=torch.float64) + 0.5
    weights = (signs * r).sum(2) * c
    grid = dual_scale_grid(weights, 2)
    assert grid.columns is not None
    torch.testing.assert_close(grid.round(weights), weights, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grid.columns, c / c.mean(), rtol=1e-4, atol=1e-4)


def test_zeros_do_no_harm() -> None:
    weights = heavy_tailed(4, 32).float()
    weights[1] = 0
    weights[:, 5] = 0
    for grid in (clipped_grid(weights, 2), dual_scale_grid(weights, 2), dual_scale_grid(torch.zeros(4, 32), 3)):
        assert bool(grid.levels.isfinite().all())
        rounded = grid.round(weights)
        assert bool(rounded.isfinite().all())
        assert float(rounded[1].abs().max()) < 1e-6
        assert float(rounded[:, 5].abs().max()) < 1e-4
    without = weights[:, [j for j in range(32) if j != 5]]
    error = (dual_scale_grid(weights, 2).round(weights) - weights).square().sum()
    torch.testing.assert_close(error, (dual_scale_grid(without, 2).round(without) - without).square().sum())


def test_nearest_values() -> None:
    grid = Grid(torch.tensor([[-1.0, 0.0, 3.0]]), torch.tensor([1.0, 1.0, 2.0, 2.0]))
    rounded = grid.round(torch.tensor([[-0.6, 1.4, 3.2, -9.0]]))
    torch.testing.assert_close(rounded, torch.tensor([[-1.0, 0.0, 6.0, -2.0]]))


def test_group_size() -> None:
    assert [group_size(columns) for columns in (128, 1536, 576, 896, 96, 100)] == [128, 128, 64, 128, 32, 4]
