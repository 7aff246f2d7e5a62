"""Wrap the collectives of torch.distributed that a conversion on several GPUs needs, one process per GPU.

Calibration batches and rows of matrices are sharded; sums and factors are exchanged; all get the same quantized block.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed

from d2q_edge.errors import D2QError
from d2q_edge.utils.machine import usable_cpus

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that share a conversion, seen from one of them. A single one exchanges nothing."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where the backend expects tensors."""

    @classmethod
    def from_environment(cls, device: torch.device) -> ProcessGroup:
        """Read the group from torchrun's environment variables; `connect` connects it.

        Args:
            device: "cuda" stands for the GPU of this process's local rank.

        Raises:
            D2QError: there are more processes than GPUs.
        """
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size == 1:
            return cls(device=device)
        # torchrun sets OMP_NUM_THREADS=1.
        torch.set_num_threads(max(1, usable_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", world_size))))
        if device.type == "cuda":
            local_rank = int(os.environ.get("LOCAL_RANK", "0"))
            if local_rank >= torch.cuda.device_count():
                raise D2QError(
                    f"there are {world_size} processes for {torch.cuda.device_count()} GPUs; use --gpus, or torchrun's "
                    "--nproc-per-node, with the number of GPUs"
                )
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        return cls(int(os.environ.get("RANK", "0")), world_size, device)

    def connect(self) -> None:
        """Initialize torch.distributed (NCCL for CUDA, else gloo), unless it is."""
        if self.world_size == 1 or torch.distributed.is_initialized():
            return
        cuda = self.device.type == "cuda"
        torch.distributed.init_process_group(
            "nccl" if cuda else "gloo",
            timeout=timedelta(days=1),  # rank 0 refines and writes the file while the others wait
            device_id=self.device if cuda else None,
        )
        # Without it, a process that ends early may abort those that still communicate with it.
        atexit.register(torch.distributed.destroy_process_group)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the process that writes files and prints."""
        return self.rank == 0

    def shard_range(self, length: int) -> range:
        """Return this process's share of `length` batches: contiguous, so that any stride is spread evenly, too."""
        return range(self.rank * length // self.world_size, (self.rank + 1) * length // self.world_size)

    def shard(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this process's share of a tensor's rows, a view."""
        return tensor.tensor_split(self.world_size)[self.rank]

    def all_reduce(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in place."""
        for tensor in tensors:
            self._in_place(tensor, torch.distributed.all_reduce)

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """Replace a tensor by that of rank `source`, in place."""
        self._in_place(tensor, lambda sent: torch.distributed.broadcast(sent, source))

    def all_gather(self, shard: torch.Tensor, rows: int) -> torch.Tensor:
        """Return the tensor of `rows` rows whose `shard` each process has."""
        if self.world_size == 1:
            return shard
        whole = torch.empty((rows, *shard.shape[1:]), dtype=shard.dtype, device=self.device)
        self.shard(whole).copy_(shard)
        for rank, part in enumerate(whole.tensor_split(self.world_size)):
            self.broadcast(part, rank)
        return whole.to(shard.device)

    def compute_sharded(
        self, pieces: Sequence[torch.Tensor], costs: Sequence[int], compute: Callable[[int], torch.Tensor]
    ) -> None:
        """Fill every piece, given its index, in one process, by the costs in any unit of time, and broadcast it."""
        owners = self.assign(costs)
        for index, (piece, owner) in enumerate(zip(pieces, owners, strict=True)):
            if owner == self.rank:
                piece.copy_(compute(index))
        for piece, owner in zip(pieces, owners, strict=True):
            self.broadcast(piece, owner)

    def assign(self, costs: Sequence[int]) -> list[int]:
        """Return the rank for each of several tasks, by the longest-processing-time-first rule."""
        owners, loads = [0] * len(costs), [0] * self.world_size
        for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
            owners[task] = loads.index(min(loads))
            loads[owners[task]] += costs[task]
        return owners

    def main_first(self, action: Callable[[], T]) -> T:
        """Run an action on rank 0, and then on the other ranks."""
        if not self.is_main:
            self.barrier()
        result = action()
        if self.is_main:
            self.barrier()
        return result

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.world_size > 1:
            torch.distributed.barrier()

    def _in_place(self, tensor: torch.Tensor, collective: Callable[[torch.Tensor], object]) -> None:
        """Apply a collective to a tensor that may be on another device or not contiguous."""
        if self.world_size == 1:
            return
        sent = tensor.to(self.device).contiguous()
        collective(sent)
        if sent is not tensor:
            tensor.copy_(sent)


SINGLE_PROCESS = ProcessGroup()
