"""The KL divergence against its definition."""

import math

import pytest
import torch

from d2q_edge.quantize.kl_divergence import kl_divergence


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
