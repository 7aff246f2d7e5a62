"""The processes that share a conversion, one per GPU, as launch.py or torchrun start them; mostly there is just one.

Knows how to add up what all of them have counted and to hand a part of each to all. Does not know what is in the
tensors. Calibration batches are dealt out, and the rows of a matrix are cut into as many parts as there are
processes; what all of them need of it, pieces of a factor, is dealt out by what it costs. Every process then holds the
same block and goes on. An error in one of them ends all: who started them sees to that.
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
FIRST_EXCHANGE = 2**22
"""Numbers in it: enough for NCCL to take the ways that it takes for matrices."""


@dataclass(frozen=True)
class ProcessGroup:
    """All processes, seen from one of them.

    Attributes:
        rank: the number of this process, from 0.
        count: of processes.
        device: where tensors must be for an exchange.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def from_environment(cls, device: torch.device) -> ProcessGroup:
        """Those that were started together; on its own, a process is the only one. `meet` connects them.

        Raises:
            D2QError: more processes than GPUs.
        """
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls(device=device)
        # torchrun gives every process one thread only.
        torch.set_num_threads(max(1, usable_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", count))))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if device.type == "cuda":
            if local >= torch.cuda.device_count():
                raise D2QError(
                    f"there are {count} processes for {torch.cuda.device_count()} GPUs; use --gpus, or torchrun's "
                    "--nproc-per-node, with the number of GPUs"
                )
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        return cls(int(os.environ.get("RANK", "0")), count, device)

    def connect(self) -> None:
        """Connect the processes, before anything is exchanged; without effect when repeated."""
        if self.world_size == 1 or torch.distributed.is_initialized():
            return
        # The first process writes the file while the others wait.
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        place = self.device if self.device.type == "cuda" else None
        torch.distributed.init_process_group(backend, timeout=timedelta(days=1), device_id=place)
        # Without it, a process that ends while the others still talk to it may abort them.
        atexit.register(torch.distributed.destroy_process_group)
        # The first exchange of either kind makes connections, which takes longer than all that follow in a block.
        first = torch.zeros(FIRST_EXCHANGE, device=self.device)
        self.all_reduce([first])
        for rank in range(self.world_size):
            self.broadcast(first, rank)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def shard_range(self, number: int) -> range:
        """Which of `number` batches are this process's: neighbours, so that every nth is dealt out evenly, too."""
        return range(self.rank * number // self.world_size, (self.rank + 1) * number // self.world_size)

    def shard(self, tensor: torch.Tensor) -> torch.Tensor:
        """This process's share of a matrix's rows."""
        return tensor.tensor_split(self.world_size)[self.rank]

    def all_reduce(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace every tensor by the sum over all processes, in place."""
        if self.world_size == 1:
            return
        for tensor in tensors:
            shared = tensor.to(self.device)
            torch.distributed.all_reduce(shared)
            if shared is not tensor:
                tensor.copy_(shared)

    def all_gather(self, part: torch.Tensor, rows: int) -> torch.Tensor:
        """All rows of a matrix of which every process made its `part`."""
        if self.world_size == 1:
            return part
        whole = torch.empty((rows, *part.shape[1:]), dtype=part.dtype, device=self.device)
        for rank, piece in enumerate(whole.tensor_split(self.world_size)):
            if rank == self.rank:
                piece.copy_(part)
            self.broadcast(piece, rank)
        return whole.to(part.device)

    def compute_sharded(
        self, pieces: Sequence[torch.Tensor], costs: Sequence[int], compute: Callable[[int], torch.Tensor]
    ) -> None:
        """Fill tensors, each in one process, and give all of them to all.

        Args:
            pieces: to be filled, in place.
            costs: of every piece, the time that it takes in any unit.
            compute: makes the content of a piece, given its number.
        """
        owners = self.assign(costs)
        for number, owner in enumerate(owners):
            if owner == self.rank:
                pieces[number].copy_(compute(number))
        for piece, owner in zip(pieces, owners, strict=True):
            self.broadcast(piece, owner)

    def broadcast(self, tensor: torch.Tensor, owner: int) -> None:
        """Replace a tensor by that of the process `owner`, in place."""
        if self.world_size == 1:
            return
        # What is sent must lie in one piece.
        shared = tensor.to(self.device).contiguous()
        torch.distributed.broadcast(shared, owner)
        if shared is not tensor:
            tensor.copy_(shared)

    def assign(self, costs: Sequence[int]) -> list[int]:
        """Whose each of some tasks is, so that all are done at about the same time: the largest are dealt out first."""
        owners, loads = [0] * len(costs), [0] * self.world_size
        for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
            owners[number] = loads.index(min(loads))
            loads[owners[number]] += costs[number]
        return owners

    def main_first(self, action: Callable[[], T]) -> T:
        """Do something in the first process, and when it is done in the others."""
        if not self.is_main:
            self.barrier()
        result = action()
        if self.is_main:
            self.barrier()
        return result

    def barrier(self) -> None:
        """Until all processes are here."""
        if self.world_size > 1:
            torch.distributed.barrier()


SINGLE_PROCESS = ProcessGroup()
"""The one process of a conversion that isn't shared."""
