"""Error feedback across rows: the shifts are the best answer to the errors so far, and the whole error falls."""

import numpy as np
import pytest
import torch

from d2q_edge.formats.tensor_types import D2Q2
from d2q_edge.quantize import output_hessian
from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.gptaq import layer_feedback, quantize_layer
from d2q_edge.quantize.output_hessian import OutputHessian, piece_sizes
from d2q_edge.quantize.row_feedback import SHRINKAGE, RowFeedback
from d2q_edge.quantize.statistics import InputStatistics

CPU = torch.device("cpu")


def gradients(tokens: int, rows: int, seed: int = 0) -> torch.Tensor:
    """Correlated gradients of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(tokens, max(2, rows // 8), generator=generator)
    mixed = common @ torch.randn(common.shape[1], rows, generator=generator)
    noise = torch.randn(tokens, rows, generator=generator) * 2
    return (mixed + noise) * torch.exp(torch.randn(rows, generator=generator))


def observed(values: torch.Tensor) -> OutputHessian:
    """Return the second moments of gradients [tokens, rows]."""
    hessian = OutputHessian.zeros(values.shape[1])
    hessian.add_batch(values)
    return hessian.complete()


def test_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens count by the gradient's norm; rows of different pieces don't meet; zeros do no harm."""
    monkeypatch.setattr(output_hessian, "PIECE", 20)
    assert piece_sizes(50) == [16, 17, 17]
    values = gradients(300, 50)
    values[7] = 0
    hessian = observed(values)
    expected = sum(np.outer(g, g) / np.linalg.norm(g) for g in values.double().numpy() if np.any(g))
    start = 0
    for piece in hessian.pieces:
        here = slice(start, start + len(piece))
        np.testing.assert_allclose(piece.double().numpy(), expected[here, here], rtol=1e-3, atol=1e-3)
        start += len(piece)
    assert start == 50


def test_stored_between_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_hessian, "PIECE", 32)
    hessian = observed(gradients(100, 48))
    arrays = hessian.to_arrays("a") | observed(gradients(100, 8)).to_arrays("a.b")
    found = OutputHessian.from_arrays(arrays, "a")
    assert len(found.pieces) == len(hessian.pieces) == 2
    found.add_batch(gradients(100, 48, 1))
    hessian.add_batch(gradients(100, 48, 1))
    assert all(torch.equal(one, other) for one, other in zip(found.pieces, hessian.pieces, strict=True))
    assert not OutputHessian.from_arrays(arrays, "c").pieces


def test_scaled_and_chosen_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that is multiplied by a factor has gradients divided by it."""
    values, factors = gradients(100, 40), torch.rand(40) + 0.5
    hessian = OutputHessian([values.T @ values])
    torch.testing.assert_close(
        hessian.scaled(factors).pieces[0], (values / factors).T @ (values / factors), rtol=1e-4, atol=1e-2
    )
    chosen = torch.arange(40) % 3 == 0
    torch.testing.assert_close(hessian.rows(chosen).pieces[0], values[:, chosen].T @ values[:, chosen])
    monkeypatch.setattr(output_hessian, "PIECE", 20)
    parted = OutputHessian([torch.eye(20), 2 * torch.eye(20)]).rows(torch.arange(40) >= 25)
    assert [piece.tolist() for piece in parted.pieces] == [(2 * torch.eye(15)).tolist()]


def test_rows_without_moments_are_independent() -> None:
    feedback = RowFeedback(10, 4, None, CPU)
    (rows,) = feedback.classes
    assert rows.tolist() == list(range(10))
    assert feedback.shift(0) is None
    feedback.add_error(0, torch.ones(10, 4))


@pytest.mark.parametrize("sizes", [(64,), (50, 51)])
def test_shifts_minimize_the_loss(sizes: tuple[int, ...]) -> None:
    """They are -inv(G_RR) G_RD E_D for all rows done so far, piece by piece, with correlations that are lowered."""
    moments = [(values := gradients(2000, size, size)).T @ values for size in sizes]
    rows, columns = sum(sizes), 5
    feedback = RowFeedback(rows, columns, OutputHessian(moments), CPU)
    assert sorted(torch.cat(feedback.classes).tolist()) == list(range(rows))
    assert all(int(each.diff().min()) > 1 for each in feedback.classes)
    whole = np.zeros((rows, rows))
    start = 0
    for G in moments:
        lowered = (1 - SHRINKAGE) * G.double().numpy()
        lowered[np.diag_indices(len(G))] = G.diagonal()
        whole[start : start + len(G), start : start + len(G)] = lowered
        start += len(G)
    errors, done = np.zeros((rows, columns)), np.zeros(rows, dtype=bool)
    generator = torch.Generator().manual_seed(0)
    for number, chosen in enumerate(feedback.classes):
        own = chosen.numpy()
        best = -np.linalg.solve(whole[~done][:, ~done], whole[~done][:, done] @ errors[done])
        expected = np.zeros((rows, columns))
        expected[~done] = best
        shift = feedback.shift(number)
        assert shift is not None
        np.testing.assert_allclose(shift.numpy(), expected[own], rtol=2e-3, atol=2e-4 * max(1, np.abs(best).max()))
        missed = torch.randn(len(own), columns, generator=generator)
        errors[own] = (shift + missed).numpy()
        done[own] = True
        feedback.add_error(number, missed)


def test_no_gradients() -> None:
    """Rows without gradients neither get shifts nor give them; without any, nothing is shifted."""
    values = gradients(500, 64)
    values[:, 1] = 0
    for moments in (values.T @ values, torch.zeros(64, 64)):
        feedback = RowFeedback(64, 3, OutputHessian([moments]), CPU)
        for number, chosen in enumerate(feedback.classes):
            shift = feedback.shift(number)
            assert shift is not None
            assert bool(shift.isfinite().all())
            assert not bool(shift[(chosen == 1) | (moments.diagonal()[chosen] == 0)].any())
            feedback.add_error(number, torch.ones(len(chosen), 3))


def test_less_loss() -> None:
    """The whole loss tr(G E H E^T) falls by a tenth and more, though each row's own error rises."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = 128, 256
    weights = torch.randn(rows, columns, generator=generator)
    statistics = InputStatistics(columns)
    inputs = torch.randn(2000, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    statistics.add_batch(inputs, inputs)
    values = gradients(4000, rows)
    G = values.T @ values
    search = CodebookSearch(D2Q2)
    feedback = layer_feedback(statistics, D2Q2, 0.0)
    losses, own = [], []
    for hessian in (None, OutputHessian([G])):
        quantized = torch.empty_like(weights)
        across = RowFeedback(rows, columns, hessian, CPU)
        for number, chosen in enumerate(across.classes):
            shift = across.shift(number)
            target = weights[chosen] if shift is None else weights[chosen] + shift
            quantized[chosen] = quantize_layer(target, feedback, search).weights
            across.add_error(number, quantized[chosen] - target)
        error = (quantized - weights).double()
        inner = error @ statistics.hessian.double() @ error.T
        losses.append(float((G.double() * inner).sum()))
        own.append(float((G.diagonal() * inner.diagonal()).sum()))
    assert losses[1] < 0.9 * losses[0]
    assert own[1] > own[0]
