"""Changes that are carried over in two steps, against one that carries every change over at once."""

import pytest
import torch

from d2q_edge.quantize import lazy_update
from d2q_edge.quantize.lazy_update import LazyUpdate, spans

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(spans(2304, 256, CPU)) == [(0, 2304)]
    assert list(spans(2304, 256, CUDA)) == [(0, 1024), (1024, 2048), (2048, 2304)]
    assert list(spans(96, 32, CUDA)) == [(0, 96)]
    monkeypatch.setattr(lazy_update, "SPAN", 100)
    assert list(spans(192, 64, CUDA)) == [(0, 64), (64, 128), (128, 192)]
    # A block that is wider than a span is one.
    assert list(spans(512, 256, CUDA)) == [(0, 256), (256, 512)]


@pytest.mark.parametrize("long", [False, True], ids=["short products", "long products"])
@pytest.mark.parametrize("kinds", [1, 2])
def test_trail(kinds: int, long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_update, "SPAN", 96)
    monkeypatch.setattr(lazy_update, "prefers_products", lambda _: long)
    generator = torch.Generator().manual_seed(0)
    block, columns = 32, 224
    work = torch.randn(5, columns, generator=generator)
    influences = torch.randn(kinds, columns, columns, generator=generator)
    changes = torch.randn(kinds, 5, columns, generator=generator)
    expected, seen = work.double(), []
    for column in range(columns):
        end = (column // block + 1) * block
        for change, influence in zip(changes.double(), influences.double(), strict=True):
            expected[:, end:] += change[:, column, None] * influence[column, end:]
    for begin, end in spans(columns, block, CPU):
        steps = LazyUpdate(work[:, begin:end], work[:, end:], [each[begin:end, begin:] for each in influences])
        for start in range(begin, end, block):
            # A block is complete when its turn comes.
            seen.append(work[:, start : start + block].clone())
            steps.add(*changes[:, :, start : start + block])
        steps.finish()
    assert len(seen) == columns // block
    torch.testing.assert_close(work.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(seen, 1).double(), expected, rtol=1e-4, atol=1e-4)
