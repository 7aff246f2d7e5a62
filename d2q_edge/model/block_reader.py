"""Read the weights of one block after another, as they are stored, onto the CPU."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import Family

Tensors = list[tuple[str, torch.Tensor]]


class BlockReader:
    """Read the blocks of one checkpoint.

    With `ahead`, for a GPU, a thread reads and checks the next block while the GPU works on the current one; with `pin`
    into pinned memory, from which transfers take a tenth of the time.
    """

    def __init__(self, checkpoint: Checkpoint, family: Family, *, ahead: bool, pin: bool = True) -> None:
        self._checkpoint, self._family, self._pin = checkpoint, family, pin
        self._pool = ThreadPoolExecutor(1) if ahead else None
        self._begun: tuple[int, Future[Tensors]] | None = None

    def begin(self, index: int) -> None:
        """Start reading block `index`, if it exists and blocks are read ahead."""
        if self._pool is not None and 0 <= index < self._family.num_layers:
            self._begun = index, self._pool.submit(lambda: list(self._read(index, pin=self._pin)))

    def read(self, index: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield a block's tensors with their names in it; raise D2QError if one holds NaN or can't be read."""
        begun, self._begun = self._begun, None
        if begun is not None and begun[0] == index:
            yield from begun[1].result()
        else:
            yield from self._read(index, pin=False)

    def _read(self, index: int, *, pin: bool) -> Iterator[tuple[str, torch.Tensor]]:
        prefix = self._family.block_prefix(index)
        for name in self._family.tensor_shapes():
            if name.startswith(prefix):
                tensor = self._family.arranged(name, self._checkpoint.tensor(name))
                # torch keeps pinned memory for reuse, because pinning takes longer than reading.
                yield name.removeprefix(prefix), tensor.pin_memory() if pin else tensor
