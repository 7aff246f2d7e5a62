"""Coordinate descent: its objective in float64, its two moves against slow versions, and what it returns."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from d2q_edge.formats.tensor_types import ALL, D2Q2, D2Q2_64, D2Q3_64, Q4_0, TensorType, dequantize
from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.descent import CoordinateDescent, DampedHessian, descend
from d2q_edge.quantize.gptaq import Feedback, layer_feedback, quantize_layer
from d2q_edge.quantize.quantized_layer import QuantizedLayer
from d2q_edge.quantize.rtn import round_layer
from d2q_edge.quantize.statistics import InputStatistics
from tests.quantize.slow_descent import Matrix, least_squares, slow_feedback, slow_nearest

pytestmark = pytest.mark.usefixtures("either")
KINDS = pytest.mark.parametrize("kind", (*ALL, Q4_0), ids=lambda kind: kind.name)
FLOAT16 = 7e-4
"""Half a unit in float16's last place, and what float32 loses."""
SEARCHES = {kind: CodebookSearch(kind, exhaustive=True) for kind in (*ALL, Q4_0)}


@dataclass
class Case:
    """One matrix to quantize; h and t are the objective's, in float64."""

    weights: torch.Tensor
    statistics: InputStatistics
    alpha: float
    h: Matrix
    t: Matrix

    def errors(self, quantized: torch.Tensor) -> Matrix:
        """The objective, row by row."""
        off = quantized.double().numpy() - self.t
        errors: Matrix = ((off @ self.h) * off).sum(1)
        return errors

    def feedback(self, kind: TensorType) -> Feedback:
        return layer_feedback(self.statistics, kind, self.alpha)

    def quantize(self, kind: TensorType) -> QuantizedLayer:
        return quantize_layer(self.weights, self.feedback(kind), SEARCHES[kind])

    def descend(self, layer: QuantizedLayer, kind: TensorType, rounds: int = 2) -> QuantizedLayer:
        return descend(layer, *self.problem(kind), SEARCHES[kind], rounds)

    def descent(self, layer: QuantizedLayer, kind: TensorType) -> CoordinateDescent:
        return CoordinateDescent(layer, *self.problem(kind), SEARCHES[kind])

    def problem(self, kind: TensorType) -> tuple[torch.Tensor, DampedHessian]:
        feedback = self.feedback(kind)
        return feedback.target(self.weights), DampedHessian.of(self.statistics, feedback, SEARCHES[kind])


def make(columns: int, alpha: float = 0.5, rows: int = 16, dead: slice = slice(0)) -> Case:
    """Correlated inputs of different sizes, perturbed a little; those of `dead` are zero."""
    generator = torch.Generator().manual_seed(columns)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    sizes = torch.exp(0.5 * torch.randn(columns, generator=generator))
    original = torch.randn(1500, columns, generator=generator) @ mix * sizes
    perturbed = original * 0.97 + 0.1 * torch.randn(1500, columns, generator=generator) @ mix * sizes
    perturbed[:, dead] = 0
    weights = torch.randn(rows, columns, generator=generator) * 0.05
    statistics = InputStatistics(columns)
    statistics.add_batch(perturbed, original)
    x, y = perturbed.double().numpy(), original.double().numpy()
    h, d = 2 / 1500 * x.T @ x, 2 / 1500 * (y - x).T @ x
    alive = h.diagonal() > 0
    h += 0.01 * h.diagonal().mean() * np.eye(columns)
    w = weights.double().numpy() * alive
    return Case(weights, statistics, alpha, h, w + alpha * w @ d @ np.linalg.inv(h))


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@KINDS
def test_objective_falls(kind: TensorType, alpha: float) -> None:
    """By 7 percent and more, mostly 15, and in no row does it rise."""
    case = make(2 * kind.block_size if kind.block_size > 32 else 128, alpha)
    layers = [case.quantize(kind)]
    layers += [case.descend(layers[0], kind, rounds) for rounds in (1, 2)]
    errors = [case.errors(layer.weights) for layer in layers]
    assert (errors[1] <= errors[0] * (1 + 1e-4)).all()
    assert (errors[2] <= errors[1] * (1 + 1e-4)).all()
    assert errors[1].sum() < 0.93 * errors[0].sum()
    assert errors[2].sum() < errors[1].sum()


@KINDS
def test_every_move_lowers_the_objective(kind: TensorType) -> None:
    """Also from a bad start, rounding to nearest at scales that are too large."""
    case = make(4 * kind.block_size if kind.block_size < 256 else 512)
    start = round_layer(case.weights, SEARCHES[kind])
    start = QuantizedLayer(start.scales * 1.25, start.codebooks, start.codes, start.weights * 1.25)
    descent = case.descent(start, kind)
    errors = [case.errors(start.weights)]
    for move in (descent.fit_scales, descent.choose_codes) * 2:
        move()
        errors.append(case.errors(descent.layer().weights))
        assert (errors[-1] <= errors[-2] * (1 + 1e-4)).all()
    assert errors[1].sum() < 0.9 * errors[0].sum()
    assert errors[2].sum() < 0.7 * errors[1].sum()


@KINDS
def test_codes_stand_for_the_returned_weights(kind: TensorType) -> None:
    case = make(2 * kind.block_size)
    before = case.quantize(kind)
    copy = [part.clone() for part in (before.scales, before.codebooks, before.codes, before.weights)]
    layer = case.descend(before, kind)
    np.testing.assert_array_equal(dequantize(kind, layer.pack(kind)), layer.weights.numpy())
    assert not torch.equal(layer.codes, before.codes)
    assert not kind.has_codebooks or not torch.equal(layer.codebooks, before.codebooks)
    assert not torch.equal(layer.scales, before.scales)
    # The last move is that of the scales.
    np.testing.assert_allclose(layer.scales.numpy(), least_squares(kind, layer, case.h, case.t), rtol=FLOAT16)
    # What was handed in stays.
    for old, part in zip(copy, (before.scales, before.codebooks, before.codes, before.weights), strict=True):
        assert torch.equal(old, part)


def test_no_rounds() -> None:
    case = make(256)
    layer = case.quantize(D2Q2)
    assert case.descend(layer, D2Q2, rounds=0) is layer


@KINDS
def test_scales_are_those_of_least_squares(kind: TensorType) -> None:
    case = make(4 * kind.block_size if kind.block_size < 256 else 512)
    layer = case.quantize(kind)
    descent = case.descent(layer, kind)
    descent.fit_scales()
    expected = least_squares(kind, layer, case.h, case.t)
    np.testing.assert_allclose(descent.scales.numpy(), expected, rtol=FLOAT16)
    assert np.isclose(layer.scales.numpy(), expected, rtol=FLOAT16).all(1).mean() < 0.2


def test_scales_that_make_no_sense_are_refused() -> None:
    """In the first row the codes of one block are those of another row: its best scale is hardly above zero, or below.
    It keeps its scale, and the other blocks of the row get the best scales there are with that."""
    case = make(256)
    layer = case.quantize(D2Q2_64)
    layer.codes[0, :32] = layer.codes[5, :32]
    layer.codebooks[0, :2] = layer.codebooks[5, :2]
    layer.weights.copy_(torch.from_numpy(dequantize(D2Q2_64, layer.pack(D2Q2_64))))
    before = layer.scales.numpy().astype(np.float64)
    expected = least_squares(D2Q2_64, layer, case.h, case.t)
    assert expected[0, 0] < before[0, 0] / 2
    case.t[0] -= np.r_[layer.weights[0, :64].double().numpy(), np.zeros(192)]
    expected[0] = least_squares(D2Q2_64, layer, case.h, case.t, first=1)[0]
    descent = case.descent(layer, D2Q2_64)
    descent.fit_scales()
    assert float(descent.scales[0, 0]) == before[0, 0]
    np.testing.assert_allclose(descent.scales[1:].numpy(), expected[1:], rtol=FLOAT16)
    np.testing.assert_allclose(descent.scales[0, 1:].numpy(), expected[0, 1:], rtol=FLOAT16)
    # Two and a half times the scale would be right.
    layer = case.quantize(D2Q2_64)
    descent = case.descent(
        QuantizedLayer(layer.scales * 0.4, layer.codebooks, layer.codes, layer.weights * 0.4), D2Q2_64
    )
    descent.fit_scales()
    assert torch.equal(descent.scales, (layer.scales * 0.4).float())


@KINDS
def test_an_empty_block_keeps_no_other_scale(kind: TensorType) -> None:
    """Nothing decides the scale of a block whose inputs are all zero; the others get their least squares."""
    columns = 3 * kind.block_size
    case = make(columns, dead=slice(kind.block_size))
    layer = case.quantize(kind)
    assert float(layer.weights[:, : kind.block_size].abs().max()) < 1e-5
    descent = case.descent(layer, kind)
    descent.fit_scales()
    expected = least_squares(kind, layer, case.h, case.t, first=1)[:, 1:]
    assert torch.equal(descent.scales[:, 0], layer.scales[:, 0].float())
    np.testing.assert_allclose(descent.scales[:, 1:].numpy(), expected, rtol=FLOAT16)
    assert not np.isclose(layer.scales[:, 1:].numpy(), expected, rtol=FLOAT16).all(1).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "blocks", "accelerator"),
    [(D2Q2, 4, False), (D2Q3_64, 4, False), (Q4_0, 4, False), (D2Q2, 5, True), (D2Q2_64, 17, True)],
    ids=["d2q2", "d2q3_64", "q4_0", "d2q2, two spans", "d2q2_64, two spans"],
)
def test_every_choice_is_the_best_of_its_candidates(
    kind: TensorType, blocks: int, accelerator: bool, request: pytest.FixtureRequest
) -> None:
    """Group after group: the present codes, or those by error feedback in the present or the nearest codebook."""
    if accelerator:
        request.getfixturevalue("accelerated")
    rows = 2 if accelerator else 8
    case = make(blocks * kind.block_size, rows=rows)
    descent = case.descent(case.quantize(kind), kind)
    state = descent.quantized().double().numpy()
    codebooks = descent.codebooks.flatten(1).tolist()
    descent.choose_codes()
    result = descent.quantized().double().numpy()
    np.testing.assert_array_equal(dequantize(kind, descent.layer().pack(kind)), descent.quantized().numpy())
    agreed, changed = [], []
    for group in range(state.shape[1] // 32):
        here = slice(group * 32, group * 32 + 32)
        scales = descent.scales[:, group * 32 // kind.block_size].double().numpy()
        gradient = ((state - case.t) @ case.h)[:, here]
        candidates = np.stack([state, state, state])
        for row in range(rows):
            target = (state[row, here] - np.linalg.solve(case.h[here, here], gradient[row])) / scales[row]
            for candidate, codebook in ((1, codebooks[row][group]), (2, slow_nearest(kind, target))):
                units = slow_feedback(kind, target, codebook, case.h[here, here])
                candidates[candidate, row, here] = units * scales[row]
        changed.append((result[:, here] != state[:, here]).any(1))
        state[:, here] = result[:, here]
        errors = np.stack([case.errors(torch.from_numpy(candidate)) for candidate in candidates])
        found = case.errors(torch.from_numpy(state))
        assert (found <= errors[0] * (1 + 1e-6)).all()
        # The compiled kernels try more codebooks.
        agreed.append(found <= errors.min(0) * (1 + 1e-6))
    assert np.mean(changed) > 0.3
    # A near tie is decided otherwise now and then.
    assert np.mean(agreed) > 0.95


@KINDS
def test_dead_columns(kind: TensorType) -> None:
    """Their weights don't matter, and they keep nothing else from getting better; one block is all dead."""
    columns = 4 * kind.block_size if kind.block_size < 256 else 768
    case = make(columns, dead=slice(0, kind.block_size + 7))
    case.weights[:, 3] = 1000.0
    layer = case.quantize(kind)
    found = case.descend(layer, kind)
    np.testing.assert_array_equal(dequantize(kind, found.pack(kind)), found.weights.numpy())
    assert bool(found.weights.isfinite().all())
    assert float(found.weights.abs().max()) < 1
    errors = [case.errors(each.weights) for each in (layer, found)]
    assert (errors[1] <= errors[0] * (1 + 1e-4)).all()
    assert errors[1].sum() < 0.95 * errors[0].sum()
