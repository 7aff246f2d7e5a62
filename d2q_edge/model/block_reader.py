"""Read the weights of one block after another, as they are stored, onto the CPU.

For a GPU a thread reads and checks the next block while the GPU works on the current one, into pinned memory, from which
transfers take a tenth of the time.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import Family

ALIGNMENT = 64
"""Every tensor starts at a multiple of this many bytes."""
Tensors = list[tuple[str, torch.Tensor]]


class BlockReader:
    """Read the blocks of one checkpoint."""

    def __init__(self, checkpoint: Checkpoint, family: Family, *, ahead: bool, pin: bool = True) -> None:
        """Prepare; nothing is read yet.

        Args:
            checkpoint, family: the model.
            ahead: whether `begin` starts a thread; otherwise it does nothing.
            pin: whether the memory for reading ahead is pinned, which takes a GPU.
        """
        self._checkpoint, self._family, self._pin = checkpoint, family, pin
        # One thread, so that two blocks are never read into the same memory at a time.
        self._pool = ThreadPoolExecutor(1) if ahead else None
        self._begun: tuple[int, Future[Tensors]] | None = None
        self._memory: torch.Tensor | None = None

    def begin(self, index: int) -> None:
        """Start reading block `index`, if it exists; the tensors that `read` returned before are overwritten."""
        if self._pool is not None and index < self._family.num_layers:
            self._begun = index, self._pool.submit(self._read_ahead, index)

    def read(self, index: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of a block with their names relative to it.

        Raises:
            D2QError: a tensor holds NaN or infinity, or can't be read.
        """
        begun, self._begun = self._begun, None
        if begun is not None and begun[0] == index:
            yield from begun[1].result()
            return
        for name, full in self._names(index).items():
            yield name, self._checkpoint.tensor(full)

    def _read_ahead(self, index: int) -> Tensors:
        found: Tensors = []
        if self._memory is None:
            # Enough for the largest block; allocated once, because pinning takes longer than reading.
            size = max(map(self._block_bytes, range(self._family.num_layers)))
            self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=self._pin)
        start = 0
        for name, full in self._names(index).items():
            tensor = self._checkpoint.tensor(full)
            place = self._memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            found.append((name, place.copy_(tensor)))
            start += _aligned(tensor.nbytes)
        return found

    def _block_bytes(self, index: int) -> int:
        read = self._checkpoint
        names = self._names(index).values()
        return sum(_aligned(torch.Size(read.shape(name)).numel() * read.dtype(name).itemsize) for name in names)

    def _names(self, index: int) -> dict[str, str]:
        """Map names relative to a block to full names."""
        prefix = self._family.block_prefix(index)
        return {name.removeprefix(prefix): name for name in self._family.tensor_shapes() if name.startswith(prefix)}


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
