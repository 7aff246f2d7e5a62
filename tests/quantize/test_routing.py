"""The tokens of experts against a slow reference that ranks them one by one."""

from __future__ import annotations

import pytest
import torch

from d2q_edge.quantize.routing import top_up


def slow(probabilities: torch.Tensor, routed: torch.Tensor, minimum: int) -> torch.Tensor:
    chosen = torch.zeros_like(routed)
    for expert in range(routed.shape[1]):
        own = [token for token in range(len(routed)) if routed[token, expert]]
        others = [token for token in range(len(routed)) if not routed[token, expert]]
        ranked = sorted((-float(probabilities[token, expert]), token) for token in others)
        for token in own + [token for _, token in ranked[: max(0, minimum - len(own))]]:
            chosen[token, expert] = True
    return chosen


@pytest.mark.parametrize("minimum", [0, 1, 12, 20, 50, 1000])
def test_like_the_reference(minimum: int) -> None:
    generator = torch.Generator().manual_seed(minimum)
    logits = torch.randn(50, 6, generator=generator) + torch.tensor([3.0, 1.0, 0.0, 0.0, -1.0, -20.0])
    # Coarse, so that many are equal.
    probabilities = (logits.softmax(1) * 32).round() / 32
    routed = torch.zeros(50, 6, dtype=torch.bool).scatter_(1, logits.topk(2, 1).indices, True)
    before = routed.clone()
    chosen = top_up(probabilities, routed, minimum)
    assert torch.equal(routed, before)
    assert torch.equal(chosen, slow(probabilities, routed, minimum))
    assert (routed.sum(0) == 0).any(), "an expert that sees no token"
    assert chosen.sum(0).min() == min(minimum, 50)


def test_by_hand() -> None:
    probabilities = torch.tensor([[0.7, 0.3], [0.9, 0.1], [0.6, 0.4], [0.8, 0.2]])
    routed = torch.tensor([[True, False]] * 4)
    assert top_up(probabilities, routed, 2).tolist() == [[True, True], [True, False], [True, True], [True, False]]
