"""Changes of one block of columns after another, carried over to the columns behind them.

On a GPU as GPTQ's lazy batch updates (arXiv 2210.17323, section 3.3) a second time: what blocks do to each other inside
a span is done at once, what they do to everything behind the span when the span is done. There a product of all rows
with 256 columns takes most of its time for reading and writing what it is added to. Knows nothing of what changes, or
why.
"""

from collections.abc import Iterable, Iterator

import torch

from d2q_edge.quantize.matmul import prefers_products, product

SPAN = 1024
"""Columns."""


def spans(columns: int, block_size: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Where each span of whole blocks begins and ends; a CPU, which gains nothing, has one."""
    width = max(SPAN // block_size, 1) * block_size if prefers_products(device) else columns
    for begin in range(0, columns, width):
        yield begin, min(begin + width, columns)


class LazyUpdate:
    """The changes of one span."""

    def __init__(self, inside: torch.Tensor, behind: torch.Tensor, influences: Iterable[torch.Tensor]) -> None:
        """Begin.

        Args:
            inside: float32 [rows, columns], the span, changed in place.
            behind: float32 [rows, later columns], everything behind it, changed in place.
            influences: of every kind of change, float32 [columns, columns + later columns]: what that of a column is
                multiplied by when it is added to one behind it.
        """
        self._inside, self._behind, self._influences = inside, behind, list(influences)
        # Kept for what is behind only.
        self._changes = [torch.empty_like(inside) for _ in self._influences if behind.shape[1]]
        self._done = 0

    def add(self, *changes: torch.Tensor) -> None:
        """The changes of the next block, of every kind float32 [rows, columns]: the rest of the span follows."""
        here = slice(self._done, self._done + changes[0].shape[1])
        for kept, change in zip(self._changes, changes, strict=False):
            kept[:, here] = change
        self._done = here.stop
        later = slice(here.stop, self._inside.shape[1])
        _carry(self._inside[:, later], changes, [each[here, later] for each in self._influences])

    def finish(self) -> None:
        """What is behind the span follows."""
        columns = self._inside.shape[1]
        _carry(self._behind, self._changes, [each[:, columns:] for each in self._influences])


def _carry(target: torch.Tensor, changes: Iterable[torch.Tensor], influences: Iterable[torch.Tensor]) -> None:
    """Add the changes' products with their influences."""
    if not target.shape[1]:
        return
    if prefers_products(target.device):
        target += product(torch.cat(tuple(changes), 1), torch.cat(tuple(influences)))
        return
    for change, influence in zip(changes, influences, strict=True):
        target += product(change, influence)
