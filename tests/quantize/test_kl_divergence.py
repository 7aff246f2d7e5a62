"""The KL divergence against its definition."""

import math

import pytest
import torch

from d2q_edge.quantize.kl_divergence import head_divergence, kl_divergence


def test_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([[0.25, 0.75], [0.25, 0.75]])
    found = kl_divergence(p.log(), q.log())
    assert found.shape == (2,)
    assert found.tolist() == pytest.approx([0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0])


def test_every_position_alone() -> None:
    log_p, log_q = torch.randn(2, 3, 4, 7, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    found = kl_divergence(log_p, log_q)
    assert found.shape == (3, 4)
    for window in range(3):
        for position in range(4):
            pairs = zip(log_p[window, position].tolist(), log_q[window, position].tolist(), strict=True)
            expected = math.fsum(math.exp(p) * (p - q) for p, q in pairs)
            assert float(found[window, position]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tokens", [1, 3, 100], ids=["token by token", "three at a time", "all at once"])
def test_through_the_head(tokens: int) -> None:
    """Sum and gradient, by torch's own differentiation in float64, whatever fits into memory at a time."""
    generator = torch.Generator().manual_seed(1)
    expected, found = torch.randn(2, 7, 5, generator=generator)
    head = torch.randn(13, 5, generator=generator)
    total, gradient = head_divergence(expected.bfloat16(), found, head, logits_bytes=tokens * 4 * 13)
    at = found.double().requires_grad_()
    log_p, log_q = ((each @ head.double().T).log_softmax(-1) for each in (expected.bfloat16().double(), at))
    slow = (log_p.exp() * (log_p - log_q)).sum()
    slow.backward()
    assert at.grad is not None
    assert float(total) == pytest.approx(slow.item(), rel=1e-5)
    torch.testing.assert_close(gradient.double(), at.grad, rtol=1e-4, atol=1e-5)


def test_capped_logits_against_autograd() -> None:
    generator = torch.Generator().manual_seed(3)
    head = torch.randn(13, 8, generator=generator)
    expected, found = torch.randn(2, 5, 8, generator=generator)
    variable = found.double().requires_grad_()

    def log_probabilities(states: torch.Tensor) -> torch.Tensor:
        return (2.0 * torch.tanh(states @ head.double().T / 2.0)).log_softmax(-1)

    log_p, log_q = log_probabilities(expected.double()), log_probabilities(variable)
    wanted = (log_p.exp() * (log_p - log_q)).sum()
    wanted.backward()
    total, gradient = head_divergence(expected, found, head, cap=2.0)
    assert float(total) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert variable.grad is not None
    torch.testing.assert_close(gradient.double(), variable.grad, rtol=1e-4, atol=1e-6)
    assert abs(float(head_divergence(expected, found, head)[0]) / float(total) - 1) > 0.1, "the cap matters"
