"""GPTAQ against a slow float64 version written from the formulas, one row and one column at a time."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from d2q_edge.errors import D2QError
from d2q_edge.formats.tensor_types import ALL, D2Q2, D2Q2_64, D2Q3, Q4_0, TensorType, dequantize
from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.gptaq import layer_feedback, quantize_layer
from d2q_edge.quantize.quantized_layer import QuantizedLayer
from d2q_edge.quantize.statistics import InputStatistics
from tests.quantize.slow_trellis import best_path

pytestmark = pytest.mark.usefixtures("either")
Matrix = npt.NDArray[np.float64]


def problem(columns: int, rows: int = 24, tokens: int = 2048) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, original inputs and perturbed inputs, with correlated columns of different sizes."""
    generator = torch.Generator().manual_seed(columns)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    sizes = torch.exp(0.7 * torch.randn(columns, generator=generator))
    original = torch.randn(tokens, columns, generator=generator) @ mix * sizes
    perturbed = original * 0.97 + 0.1 * torch.randn(tokens, columns, generator=generator) @ mix * sizes
    return torch.randn(rows, columns, generator=generator) * 0.05, original, perturbed


def statistics_of(original: torch.Tensor, perturbed: torch.Tensor) -> InputStatistics:
    statistics = InputStatistics(original.shape[1])
    for a, b in zip(perturbed.chunk(3), original.chunk(3), strict=True):
        statistics.add_batch(a, b)
    return statistics


def quantize(
    weights: torch.Tensor, statistics: InputStatistics, search: CodebookSearch, alpha: float = 0.5
) -> QuantizedLayer:
    return quantize_layer(weights, layer_feedback(statistics, search.tensor_type, alpha), search)


def slow_gptaq(
    weights: Matrix, x: Matrix, original: Matrix, kind: TensorType, alpha: float, chosen: QuantizedLayer
) -> Matrix:
    """The quantized matrix; scales and codebooks are those of `chosen`, codes and feedback are computed here."""
    n = len(x)
    h = 2 / n * x.T @ x
    d = 2 / n * (original - x).T @ x
    order: list[tuple[int, ...]] = []
    blocks = range(0, h.shape[0], kind.block_size)
    for start in sorted(blocks, key=lambda s: -h.diagonal()[s : s + kind.block_size].max()):
        for group in range(start, start + kind.block_size, 32):
            order += (
                [(group + i, group + 16 + i) for i in range(16)] if kind.paired else [(group + i,) for i in range(32)]
            )
    columns = [column for code in order for column in code]
    h, d = h[np.ix_(columns, columns)], d[np.ix_(columns, columns)]
    h += 0.01 * h.diagonal().mean() * np.eye(len(h))
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    p = alpha * np.triu(d @ u.T, 1) @ u
    levels = CodebookSearch(kind).levels.double().numpy()
    w = weights[:, columns].copy()
    result = np.empty_like(w)
    width = len(order[0])
    for row in range(len(w) if not kind.windowed else 0):
        for step, code in enumerate(order):
            here = slice(width * step, width * (step + 1))
            later = slice(width * (step + 1), None)
            scale = float(chosen.scales[row, code[0] // kind.block_size])
            codebook = levels[int(chosen.codebooks[row, code[0] // 32])] * scale
            inverse = np.linalg.inv(u[here, here])
            target = w[row, here]
            q = min(codebook, key=lambda entry: np.linalg.norm((target - entry) @ inverse))
            result[row, here] = q
            w[row, later] += target @ p[here, later] - (target - q) @ inverse @ u[here, later]
    if kind.windowed:
        result = slow_paths(w, u, p, columns, kind, levels[:, :, 0], chosen)
    undone = np.empty_like(result)
    undone[:, columns] = result
    return undone


def slow_paths(
    weights: Matrix, u: Matrix, p: Matrix, columns: list[int], kind: TensorType, levels: Matrix, chosen: QuantizedLayer
) -> Matrix:
    """The same where an entry depends on the code before: the cheapest path of every chain, with its own weights."""

    def cost(carried: Matrix, step: int, entry: float) -> float:
        return float(((carried[step] - entry) / u[step, step]) ** 2)

    def follow(carried: Matrix, step: int, entry: float) -> Matrix:
        after = carried.copy()
        error = (after[step] - entry) / u[step, step]
        after[step + 1 :] += after[step] * p[step, step + 1 :] - error * u[step, step + 1 :]
        after[step] = entry  # later steps don't look at it
        return after

    result = weights.copy()
    for row in range(len(weights)):
        for first in range(0, len(columns), 16):
            scale = float(chosen.scales[row, columns[first] // kind.block_size])
            codebook = levels[int(chosen.codebooks[row, columns[first] // 32])] * scale
            _, result[row] = best_path(result[row], range(first, first + 16), codebook, cost, follow)
    return result


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("kind", (*ALL, Q4_0), ids=lambda kind: kind.name)
def test_against_the_slow_version(kind: TensorType, alpha: float) -> None:
    weights, original, perturbed = problem(3 * kind.block_size)
    layer = quantize(weights, statistics_of(original, perturbed), CodebookSearch(kind), alpha)
    expected = slow_gptaq(
        weights.double().numpy(), perturbed.double().numpy(), original.double().numpy(), kind, alpha, layer
    )
    # float32 decides a near tie otherwise now and then, and the rest of that row follows; most rows agree entirely.
    same = np.isclose(layer.weights.numpy(), expected, rtol=1e-4, atol=1e-6).all(axis=1)
    assert same.mean() > 0.8


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("kind", [D2Q2_64, D2Q3], ids=lambda kind: kind.name)
def test_span_by_span(kind: TensorType, alpha: float, request: pytest.FixtureRequest) -> None:
    """More columns than a span has: as without spans, but where a tie is near."""
    weights, original, perturbed = problem(1280)
    statistics, search = statistics_of(original, perturbed), CodebookSearch(kind)
    expected = quantize(weights, statistics, search, alpha)
    request.getfixturevalue("accelerated")
    found = quantize(weights, statistics_of(original, perturbed), search, alpha)
    same = torch.isclose(found.weights, expected.weights, rtol=1e-4, atol=1e-6).all(1)
    assert float(same.float().mean()) > 0.6


@pytest.mark.parametrize("kind", (*ALL, Q4_0), ids=lambda kind: kind.name)
def test_codes_stand_for_the_returned_weights(kind: TensorType) -> None:
    weights, original, perturbed = problem(2 * kind.block_size)
    layer = quantize(weights, statistics_of(original, perturbed), CodebookSearch(kind))
    packed = layer.pack(kind)
    np.testing.assert_array_equal(dequantize(kind, packed), layer.weights.numpy())


@pytest.mark.parametrize("kind", [D2Q2, D2Q3, Q4_0], ids=lambda kind: kind.name)
def test_feedback_pays(kind: TensorType) -> None:
    """The error of the outputs, |X~ W - X Q|: rounding > GPTQ > GPTAQ."""
    weights, original, perturbed = problem(512, rows=64)
    search = CodebookSearch(kind)
    plain = InputStatistics(512)
    plain.add_batch(torch.eye(512), torch.eye(512))

    def error(layer: QuantizedLayer) -> float:
        return float((original @ weights.T - perturbed @ layer.weights.T).square().mean())

    rounded = error(quantize(weights, plain, search, alpha=0))
    gptq = error(quantize(weights, statistics_of(original, perturbed), search, alpha=0))
    gptaq = error(quantize(weights, statistics_of(original, perturbed), search, alpha=1.0))
    assert gptq < 0.9 * rounded
    assert gptaq < 0.99 * gptq


def test_dead_columns_become_zero_or_small_and_do_no_harm() -> None:
    weights, original, perturbed = problem(256)
    original[:, 7] = perturbed[:, 7] = 0
    weights[:, 7] = 1000.0
    layer = quantize(weights, statistics_of(original, perturbed), CodebookSearch(D2Q2))
    assert bool(layer.weights.isfinite().all())
    assert float(layer.weights.abs().max()) < 1


def test_rank_deficient_statistics_are_damped() -> None:
    weights, original, perturbed = problem(256, tokens=9)
    layer = quantize(weights, statistics_of(original, perturbed), CodebookSearch(D2Q2))
    assert bool(layer.weights.isfinite().all())


def test_hopeless_statistics_are_an_error() -> None:
    weights, original, _ = problem(256)
    bad = original.clone()
    bad[0, 0] = torch.inf
    with pytest.raises(D2QError, match="can't be factored"):
        quantize(weights, statistics_of(bad, bad), CodebookSearch(D2Q2))
