"""Scores of tokens, and their statistics, against other ways to compute them."""

import math

import numpy as np
import pytest
import torch

from d2q_edge.evaluation.token_scores import log_softmax, quantile_interval, score_tokens, stderr


def test_log_softmax() -> None:
    logits = np.random.default_rng(0).normal(0, 30, (5, 1000)).astype(np.float32)
    logits[0, 3] = 3e4
    wide = logits.astype(np.longdouble)
    wide -= wide.max(1, keepdims=True)
    expected = wide - np.log(np.exp(wide).sum(1, keepdims=True))
    found = log_softmax(logits)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected.astype(np.float64), rtol=1e-12, atol=1e-12)


def test_quantile_interval() -> None:
    """The chance that the true quantile is inside, exactly: the ends' ranks against a binomial distribution."""
    for count in (500, 2000, 20000):
        low, high = quantile_interval(np.arange(count, dtype=np.float64), 0.99)
        chances = [math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) for k in range(count + 1)]
        weights = [math.exp(c + k * math.log(0.99) + (count - k) * math.log(0.01)) for k, c in enumerate(chances)]
        # The value of rank r is below the quantile exactly if at least r values are; ranks are one more than values.
        assert 0.93 < sum(weights[int(low) + 1 : int(high) + 1]) < 0.98
    assert quantile_interval(np.array([3.0, 1.0, 2.0]), 0.99) == (3, 3)
    assert quantile_interval(np.array([3.0, 1.0, 2.0]), 0.5) == (1, 3)


@pytest.mark.parametrize("positions", [1, 63, 64, 65, 200])
def test_scores_are_those_of_torch(positions: int) -> None:
    rng = np.random.default_rng(positions)
    logits, expected = rng.normal(0, 3, (2, positions, 50)).astype(np.float32)
    targets = rng.integers(0, 50, positions).astype(np.int32)
    found = score_tokens(logits, targets, expected)
    own, base = (torch.from_numpy(values).double().log_softmax(1) for values in (logits, expected))
    chosen = torch.from_numpy(targets).long()[:, None]
    divergence = torch.nn.functional.kl_div(own, base, reduction="none", log_target=True).sum(1)
    rows = -own.gather(1, chosen)[:, 0], -base.gather(1, chosen)[:, 0], divergence, own.argmax(1) == base.argmax(1)
    np.testing.assert_allclose(found, torch.stack([row.double() for row in rows]).numpy(), rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(score_tokens(logits, targets), found[:1])
    # A reference that is known up to a constant per position is enough.
    shifted = score_tokens(logits, targets, expected.astype(np.float64) + rng.normal(0, 9, (positions, 1)))
    np.testing.assert_allclose(shifted, found, rtol=1e-9, atol=1e-12)


def test_stderr() -> None:
    values = np.random.default_rng(0).normal(0, 1, 11)
    assert stderr(values) == pytest.approx(values.std(ddof=1) / math.sqrt(11))
    assert stderr(values[:10]) == 0
