"""Changes that are carried over in two steps, against one that carries every change over at once."""

import pytest
import torch

from d2q_edge.quantize import trail
from d2q_edge.quantize.trail import Trail, spans


def test_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(spans(2304, 256)) == [(0, 1024), (1024, 2048), (2048, 2304)]
    assert list(spans(96, 32)) == [(0, 96)]
    monkeypatch.setattr(trail, "SPAN", 100)
    assert list(spans(192, 64)) == [(0, 64), (64, 128), (128, 192)]
    # One that is wider than a span is one.
    assert list(spans(512, 256)) == [(0, 256), (256, 512)]


@pytest.mark.parametrize("changes", [32, 64], ids=["as many changes as columns", "twice as many"])
def test_trail(changes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trail, "SPAN", 96)
    generator = torch.Generator().manual_seed(0)
    block, columns = 32, 224
    work = torch.randn(5, columns, generator=generator)
    influence = torch.randn(columns // block, changes, columns, generator=generator)
    made = torch.randn(columns // block, 5, changes, generator=generator)
    expected, seen = work.double(), []
    for number in range(columns // block):
        later = slice((number + 1) * block, None)
        expected[:, later] += made[number].double() @ influence[number][:, later].double()
    for begin, end in spans(columns, block):
        own = influence[begin // block : end // block].flatten(0, 1)
        steps = Trail(work[:, begin:end], work[:, end:], own[:, begin:])
        for number in range(begin // block, end // block):
            # A block is complete when its turn comes.
            seen.append(work[:, number * block : (number + 1) * block].clone())
            steps.add(made[number])
        steps.finish()
    torch.testing.assert_close(work.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(seen, 1).double(), expected, rtol=1e-4, atol=1e-4)
