"""Lazy updates, which reach the columns after a span late, against updating all later columns at once."""

import pytest
import torch

from d2q_edge.quantize.lazy_update import LazyUpdate, spans

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_spans() -> None:
    assert list(spans(2304, 256, CPU)) == [(0, 2304)]
    assert list(spans(2304, 256, CUDA)) == [(0, 1024), (1024, 2048), (2048, 2304)]
    assert list(spans(96, 32, CUDA)) == [(0, 96)]
    assert list(spans(192, 64, CUDA, span=100)) == [(0, 64), (64, 128), (128, 192)]
    # A block that is wider than a span is one.
    assert list(spans(512, 256, CUDA, span=100)) == [(0, 256), (256, 512)]


@pytest.mark.parametrize("accelerator", [False, True], ids=["cpu", "accelerator"])
@pytest.mark.parametrize("count", [1, 2])
def test_lazy_update(count: int, accelerator: bool, request: pytest.FixtureRequest) -> None:
    if accelerator:
        request.getfixturevalue("accelerated")
    generator = torch.Generator().manual_seed(0)
    block, columns = 32, 224
    work = torch.randn(5, columns, generator=generator)
    factors = torch.randn(count, columns, columns, generator=generator)
    changes = torch.randn(count, 5, columns, generator=generator)
    expected, seen = work.double(), []
    for column in range(columns):
        end = (column // block + 1) * block
        for change, factor in zip(changes.double(), factors.double(), strict=True):
            expected[:, end:] += change[:, column, None] * factor[column, end:]
    for begin, end in spans(columns, block, CUDA, span=96):
        update = LazyUpdate(work[:, begin:end], work[:, end:], [factor[begin:end, begin:] for factor in factors])
        for start in range(begin, end, block):
            # A block is complete when its turn comes.
            seen.append(work[:, start : start + block].clone())
            update.add(*changes[:, :, start : start + block])
        update.finish()
    assert len(seen) == columns // block
    torch.testing.assert_close(work.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(seen, 1).double(), expected, rtol=1e-4, atol=1e-4)
