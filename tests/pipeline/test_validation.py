"""The KL divergence on validation text: against log_softmax of all logits in double precision."""

import math

import pytest
import torch

from d2q_edge.pipeline.validation import Validation, compare_logits, scored_positions


@pytest.mark.parametrize("positions", [1, 7, 40, 1000])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_against_whole_logits(scale: float, positions: int) -> None:
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(50, 16, generator=generator)
    original = scale * torch.randn(40, 16, generator=generator)
    quantized = original + 0.1 * scale * torch.randn(40, 16, generator=generator)
    # Logits, log-probabilities, both twice, of so many positions at a time.
    logits_bytes = positions * 50 * 4 * 4
    divergences, agreements = compare_logits(original, quantized, head, logits_bytes)
    a, b = (torch.log_softmax(hidden.double() @ head.double().T, 1) for hidden in (original, quantized))
    expected = (a.exp() * (a - b)).sum(1)
    assert divergences.dtype == torch.float64
    torch.testing.assert_close(divergences, expected, rtol=1e-3, atol=1e-5 * scale)
    assert torch.equal(agreements, a.argmax(1) == b.argmax(1))
    assert 0 < int(agreements.sum()) < 40 or scale < 1
    same, all_agree = compare_logits(original, original.clone(), head, logits_bytes)
    assert float(same.abs().max()) < 1e-6
    assert bool(all_agree.all())


def test_too_little_memory_for_one_position() -> None:
    head = torch.eye(5)
    hidden = torch.arange(15.0).view(3, 5)
    divergences, agreements = compare_logits(hidden, hidden, head, 1)
    assert len(divergences) == len(agreements) == 3


def test_the_same_probability_of_another_token() -> None:
    """Both are as sure, of tokens that are not the same."""
    head = torch.eye(20)
    original, quantized = torch.zeros(2, 1, 20)
    original[0, 3] = quantized[0, 10] = 9.0
    divergences, agreements = compare_logits(original, quantized, head)
    assert not bool(agreements)
    assert float(divergences) > 8


def test_the_second_half_is_scored() -> None:
    for context, first in ((6, 3), (5, 2)):
        hidden = torch.arange(2 * context * 3).view(2, context, 3)
        expected = [hidden[window, position].tolist() for window in (0, 1) for position in range(first, context)]
        assert scored_positions(hidden).tolist() == expected


def test_summary() -> None:
    found = Validation.of(
        torch.tensor([0.1, 0.2, 0.6], dtype=torch.float64), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    )
    assert found.tokens == 3
    assert [found.kl_divergence, found.top1_agreement] == pytest.approx([0.3, 2 / 3])
    assert found.kl_divergence_stderr == pytest.approx(math.sqrt((0.04 + 0.01 + 0.09) / 3 / 2))
