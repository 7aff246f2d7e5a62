"""The collective operations that the quantizer uses where several processes share its work."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch


class Collective(Protocol):
    """A group of processes that call the same functions with the same tensors."""

    def all_reduce(self, tensors: Sequence[torch.Tensor], /) -> None:
        """Replace every tensor by its sum over all processes, in place."""

    def compute_sharded(
        self, pieces: Sequence[torch.Tensor], costs: Sequence[int], compute: Callable[[int], torch.Tensor], /
    ) -> None:
        """Compute each piece in one process and broadcast it to all of them, in place.

        Args:
            pieces: the tensors to fill.
            costs: the time that each piece takes, in any unit.
            compute: returns the content of a piece, given its index.
        """


class SingleProcess:
    """The group of a process that works alone."""

    def all_reduce(self, tensors: Sequence[torch.Tensor], /) -> None:
        """Leave the tensors as they are."""

    def compute_sharded(
        self, pieces: Sequence[torch.Tensor], costs: Sequence[int], compute: Callable[[int], torch.Tensor], /
    ) -> None:
        """Compute all pieces here."""
        for index, piece in enumerate(pieces):
            piece.copy_(compute(index))


SINGLE_PROCESS = SingleProcess()
