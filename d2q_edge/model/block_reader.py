"""The weights of one block after another, as they are stored, on the CPU.

With a GPU the next block's are read, and checked, by a thread while the GPU works on the present one, into pinned
memory, from which they are moved in a tenth of the time. Without one the processor has enough to do. Knows which
tensors a block has, and nothing of what is done to them (blocks.py).
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import Family

ALIGNMENT = 64
"""Bytes that the place of every tensor is a multiple of."""
Tensors = list[tuple[str, torch.Tensor]]


class BlockReader:
    """Of one checkpoint."""

    def __init__(self, checkpoint: Checkpoint, family: Family, *, ahead: bool, pin: bool = True) -> None:
        """Begin; nothing is read.

        Args:
            checkpoint, family: the model.
            ahead: whether `begin` does anything.
            pin: whether what is read ahead is in pinned memory, which takes a GPU.
        """
        self._checkpoint, self._family, self._pin = checkpoint, family, pin
        # One thread, so that two blocks are never read into the same memory at a time.
        self._pool = ThreadPoolExecutor(1) if ahead else None
        self._begun: tuple[int, Future[Tensors]] | None = None
        self._memory: torch.Tensor | None = None

    def begin(self, index: int) -> None:
        """Start reading a block, if there is one of that number; what `read` gave before is overwritten."""
        if self._pool is not None and index < self._family.num_layers:
            self._begun = index, self._pool.submit(self._read_ahead, index)

    def read(self, index: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of a block, by their names in it.

        Raises:
            D2QError: one is NaN or infinite, or can't be read.
        """
        begun, self._begun = self._begun, None
        if begun is not None and begun[0] == index:
            yield from begun[1].result()
            return
        for name, full in self._names(index).items():
            yield name, self._checkpoint.tensor(full)

    def _read_ahead(self, index: int) -> Tensors:
        found: Tensors = []
        memory = self._room()
        start = 0
        for name, full in self._names(index).items():
            tensor = self._checkpoint.tensor(full)
            place = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            found.append((name, place.copy_(tensor)))
            start += _aligned(tensor.nbytes)
        return found

    def _room(self) -> torch.Tensor:
        """Enough for the largest block; made once, because pinning takes longer than reading."""
        if self._memory is None:
            blocks = [self._names(index).values() for index in range(self._family.num_layers)]
            size = max(sum(_aligned(self._bytes(name)) for name in names) for names in blocks)
            self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=self._pin)
        return self._memory

    def _bytes(self, name: str) -> int:
        return torch.Size(self._checkpoint.shape(name)).numel() * self._checkpoint.dtype(name).itemsize

    def _names(self, index: int) -> dict[str, str]:
        """Names in the block to full names."""
        prefix = self._family.block_prefix(index)
        return {name.removeprefix(prefix): name for name in self._family.tensor_shapes() if name.startswith(prefix)}


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
