"""The accumulated moments against their formulas in float64."""

import pytest
import torch

from d2q_edge.quantize.statistics import InputStatistics


def test_statistics_are_means_over_all_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(3, 100, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    quantized = original * 0.9 + torch.randn(3, 100, 64, generator=generator)
    statistics = InputStatistics(64)
    statistics.add_batch(quantized[:1], original[:1])
    statistics.add_batch(quantized[1:], original[1:])
    x, y = quantized.double().flatten(0, 1), original.double().flatten(0, 1)
    torch.testing.assert_close(statistics.hessian.double(), 2 / 300 * x.T @ x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(statistics.dXXT.double(), 2 / 300 * (y - x).T @ x, rtol=1e-4, atol=1e-4)


def test_weights_count_tokens() -> None:
    """A token of weight 2 counts as two; the mean is still over the number of tokens."""
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(2, 50, 16, generator=generator)
    weights = torch.rand(50, generator=generator) * 10
    statistics = InputStatistics(16)
    statistics.add_batch(x, y, weights)
    weighted = weights.double()[:, None] * x.double()
    torch.testing.assert_close(statistics.hessian.double(), 2 / 50 * x.double().T @ weighted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(statistics.dXXT.double(), 2 / 50 * (y - x).double().T @ weighted, rtol=1e-4, atol=1e-4)


def test_sums_of_two_processes_add_up() -> None:
    x, y = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(1))
    whole, first, second = InputStatistics(8), InputStatistics(8), InputStatistics(8)
    whole.add_batch(x, y)
    first.add_batch(x[:20], y[:20])
    second.add_batch(x[20:], y[20:])
    for total, part in zip(first.sums, second.sums, strict=True):
        total += part
    torch.testing.assert_close(first.hessian, whole.hessian)
    torch.testing.assert_close(first.dXXT, whole.dXXT)


@pytest.mark.parametrize("tokens", [0, 5])
def test_inputs_that_are_always_zero(tokens: int) -> None:
    """Errors of all columns count alike."""
    statistics = InputStatistics(4)
    statistics.add_batch(torch.zeros(tokens, 4), torch.ones(tokens, 4))
    assert torch.equal(statistics.hessian, torch.eye(4))
    assert not statistics.dXXT.any()
