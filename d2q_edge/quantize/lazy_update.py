"""Update lazily, in batches, the columns that are still to be quantized (GPTQ, arXiv 2210.17323, section 3.3).

Inside a span of columns every block updates the rest of the span at once. The columns after the span are updated once
per span, by one large product instead of one small product per block: a GPU spends most of a small one on reading and
writing the columns that it adds to.
"""

from collections.abc import Iterable, Iterator

import torch

from d2q_edge.quantize import matmul

SPAN = 1024
"""Columns per span on an accelerator."""


def spans(columns: int, block_size: int, device: torch.device, span: int = SPAN) -> Iterator[tuple[int, int]]:
    """Yield start and end of each span of whole blocks; a CPU gains nothing by them and gets a single one."""
    width = max(span // block_size, 1) * block_size if matmul.is_accelerator(device) else columns
    for begin in range(0, columns, width):
        yield begin, min(begin + width, columns)


class LazyUpdate:
    """The pending update of one span: for every factor F, columns += change of a block @ F[block, columns]."""

    def __init__(self, span: torch.Tensor, later: torch.Tensor, factors: Iterable[torch.Tensor]) -> None:
        """Start a span.

        Args:
            span, later: float32 [rows, ...], the columns of the span and all later ones, updated in place.
            factors: float32 [columns of the span, these and later columns] each, such as rows of U and P.
        """
        self._span, self._later, self._factors = span, later, list(factors)
        # Only needed for the later columns.
        self._changes = [torch.empty_like(span) for _ in self._factors if later.shape[1]]
        self._done = 0

    def add(self, *changes: torch.Tensor) -> None:
        """Update the rest of the span by the next block's changes, float32 [rows, block_size], one per factor."""
        here = slice(self._done, self._done + changes[0].shape[1])
        for kept, change in zip(self._changes, changes, strict=False):
            kept[:, here] = change
        self._done = here.stop
        later = slice(here.stop, self._span.shape[1])
        _add_products(self._span[:, later], changes, [factor[here, later] for factor in self._factors])

    def finish(self) -> None:
        """Update the columns after the span by all of its changes."""
        _add_products(self._later, self._changes, [factor[:, self._span.shape[1] :] for factor in self._factors])


def _add_products(target: torch.Tensor, changes: Iterable[torch.Tensor], factors: Iterable[torch.Tensor]) -> None:
    if not target.shape[1]:
        return
    if matmul.is_accelerator(target.device):
        target += matmul.product(torch.cat(tuple(changes), 1), torch.cat(tuple(factors)))
        return
    for change, factor in zip(changes, factors, strict=True):
        target += matmul.product(change, factor)
