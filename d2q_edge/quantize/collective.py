"""Define the collective operations that the quantizer uses where several processes share its work."""

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
        """Fill every piece, given its index, in one process, by the costs in any unit of time, and broadcast it."""
        for index, piece in enumerate(pieces):
            piece.copy_(compute(index))


class SingleProcess(Collective):
    """A process that works alone."""

    def all_reduce(self, tensors: Sequence[torch.Tensor], /) -> None:
        """Leave the tensors as they are."""


SINGLE_PROCESS = SingleProcess()
