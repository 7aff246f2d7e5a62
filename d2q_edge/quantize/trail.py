"""Changes of one block of columns after another, carried over to the columns behind them, few large products at a time.

GPTQ's lazy batch updates (arXiv 2210.17323, section 3.3) a second time: what blocks do to each other inside a span is
done at once, what they do to everything behind the span when the span is done. A product of all rows with 256 columns
takes most of its time for reading and writing what it is added to. Knows nothing of what changes, or why.
"""

from collections.abc import Iterator

import torch

from d2q_edge.quantize.precision import product

SPAN = 1024
"""Columns."""


def spans(columns: int, block_size: int) -> Iterator[tuple[int, int]]:
    """Where each span of whole blocks begins and ends."""
    width = max(SPAN // block_size, 1) * block_size
    for begin in range(0, columns, width):
        yield begin, min(begin + width, columns)


class Trail:
    """The changes of one span."""

    def __init__(self, inside: torch.Tensor, behind: torch.Tensor, influence: torch.Tensor) -> None:
        """Begin.

        Args:
            inside: float32 [rows, columns], the span, changed in place.
            behind: float32 [rows, later columns], everything behind it, changed in place.
            influence: float32 [changes, columns + later columns]: what every change is multiplied by when it is added
                to a column; changes in the order of the blocks, as many for each.
        """
        self._inside, self._behind, self._influence = inside, behind, influence
        self._changes = inside.new_empty(len(inside), len(influence))
        self._done = 0

    def add(self, change: torch.Tensor) -> None:
        """The changes of the next block, float32 [rows, changes of a block]: the rest of the span follows."""
        columns, changes = self._inside.shape[1], self._changes.shape[1]
        here = slice(self._done, self._done + change.shape[1])
        self._changes[:, here], self._done = change, here.stop
        later = slice(columns * self._done // changes, columns)
        if later.start < columns:
            self._inside[:, later] += product(change, self._influence[here, later])

    def finish(self) -> None:
        """What is behind the span follows."""
        if self._behind.shape[1]:
            self._behind += product(self._changes, self._influence[:, self._inside.shape[1] :])
