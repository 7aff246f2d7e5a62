"""Attention on a CPU, some queries at a time, against the formula in float64."""

import pytest
import torch

from d2q_edge.model import attention

CONTEXT = 37


def slow_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Softmax of the scaled scores that `mask` [context, context] shows, times the values: [windows, context, ...]."""
    shared = query.shape[1] // key.shape[1]
    key, value = key.double().repeat_interleave(shared, 1), value.double().repeat_interleave(shared, 1)
    scores = (query.double() @ key.transpose(2, 3) * 0.3).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("queries", [8, 37, 128])
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("window", [None, 5])
def test_some_queries_at_a_time(monkeypatch: pytest.MonkeyPatch, queries: int, heads: int, window: int | None) -> None:
    monkeypatch.setattr(attention, "QUERIES", queries)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 6, CONTEXT, 16, generator=generator)
    key, value = torch.randn(2, 3, heads, CONTEXT, 16, generator=generator)
    distance = torch.arange(CONTEXT)[:, None] - torch.arange(CONTEXT)
    mask = (distance >= 0) & (distance < (window or CONTEXT))
    given = None if window is None else mask[None, None]
    found, _ = attention._by_queries(torch.nn.Identity(), query, key, value, given, scaling=0.3, dropout=0.0)
    torch.testing.assert_close(found.double(), slow_attention(query, key, value, mask), rtol=1e-5, atol=1e-5)


def test_every_kind_of_device_has_one() -> None:
    names = [attention.attention_for(torch.device(kind)) for kind in ("cpu", "cuda", "mps")]
    assert names == ["sdpa_by_queries", "sdpa_bfloat16", "sdpa"]
