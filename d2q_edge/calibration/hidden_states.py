"""Hold the calibration tokens' hidden states between two blocks, batch by batch: on the GPU, in memory, or on disk.

They are kept as bfloat16, as in most models' own inference; against float32 the KL divergence of the finished models
did not change measurably (docs/accuracy.md).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from d2q_edge.distributed.process_group import ProcessGroup
from d2q_edge.errors import D2QError
from d2q_edge.model.blocks import BlockRunner

DTYPE = torch.bfloat16
Place: TypeAlias = torch.device | Path
"""Where hidden states are kept: a torch device, or a directory for a temporary file."""


class HiddenStates:
    """Hidden states of numbered batches; `states[i]` is float32 [windows, context, channels] on the device."""

    def __init__(
        self,
        windows: Sequence[int],
        shape: tuple[int, int],
        device: torch.device,
        place: Place,
        dtype: torch.dtype = DTYPE,
    ) -> None:
        """Prepare the storage.

        Args:
            windows: number of windows of every batch.
            shape: (context, channels).
            device: the computing device.
            place, dtype: where and as what the batches are kept.

        Raises:
            D2QError: the file can't be made.
        """
        self.device, self._shape, self._windows, self._dtype = device, shape, tuple(windows), dtype
        self._bytes = [count * shape[0] * shape[1] * dtype.itemsize for count in windows]
        self._place = place
        self._kept: dict[int, torch.Tensor] = {}
        self._written: set[int] = set()
        if isinstance(place, Path):
            try:
                place.mkdir(parents=True, exist_ok=True)
                # Without a name, so that it vanishes with the process; open as long as this object lives.
                self._file = tempfile.TemporaryFile(dir=place, buffering=0)  # noqa: SIM115
            except OSError as error:
                raise D2QError(f"can't keep hidden states in {place}: {error.strerror or error}") from error

    def __len__(self) -> int:
        return len(self._windows)

    @property
    def context(self) -> int:
        """Tokens of a window."""
        return self._shape[0]

    def copy(self) -> HiddenStates:
        """Return the same states, which stay when these are replaced; raises D2QError if the file can't be made."""
        shape, windows = self._shape, self._windows
        result = HiddenStates(windows, shape, self.device, self._place, self._dtype)
        if isinstance(self._place, Path):
            for index in self._written:
                result[index] = self[index]
        else:
            # Batches are replaced, never changed.
            result._kept = dict(self._kept)
        return result

    def tokens(self, index: int) -> int:
        """Return the number of tokens in batch `index`."""
        return self._windows[index] * self._shape[0]

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._read(index, 0, self._windows[index])

    def window(self, index: int, number: int) -> torch.Tensor:
        """Return window `number` of batch `index`, float32 [1, context, channels] on the computing device."""
        return self._read(index, number, number + 1)

    def _read(self, index: int, start: int, end: int) -> torch.Tensor:
        if isinstance(self._place, Path):
            size = self._bytes[index] // self._windows[index]
            buffer = bytearray((end - start) * size)
            self._file.seek(sum(self._bytes[:index]) + start * size)
            if self._file.readinto(buffer) != len(buffer):
                raise D2QError(f"hidden states kept in {self._place} can't be read back; is the disk full?")
            kept = torch.frombuffer(buffer, dtype=self._dtype).view(end - start, *self._shape)
        else:
            kept = self._kept[index][start:end]
        return kept.to(self.device).float()

    def __setitem__(self, index: int, hidden: torch.Tensor) -> None:
        kept = hidden.detach().to(self._dtype)
        if not isinstance(self._place, Path):
            self._kept[index] = kept.to(self._place)
            return
        self._written.add(index)
        data = kept.cpu().contiguous().view(torch.uint8).numpy().reshape(-1)
        try:
            self._file.seek(sum(self._bytes[:index]))
            written = self._file.write(data.data)
        except OSError as error:
            raise D2QError(
                f"can't keep hidden states in {self._place} ({error.strerror or error}); free some disk space and run "
                "the same command"
            ) from error
        if written != len(data):
            raise D2QError(f"can't keep hidden states in {self._place}: the disk is full; free some and run it again")


class StreamPair:
    """The hidden states of the same windows in the original and in the quantized model, between two blocks.

    Attributes:
        original, quantized: HiddenStates of both models.
        own: the batches that are this process's share.
    """

    def __init__(
        self,
        runner: BlockRunner,
        windows: npt.NDArray[np.int64],
        batch_tokens: int,
        place: Place,
        processes: ProcessGroup,
        dtype: torch.dtype = DTYPE,
    ) -> None:
        """Embed windows of token ids [windows, context], in batches of about `batch_tokens`."""
        self.runner, self.windows = runner, windows
        batches = torch.from_numpy(windows).split(max(1, batch_tokens // windows.shape[1]))
        self.sizes = [len(batch) for batch in batches]
        self.own = processes.shard_range(len(batches))
        shape = windows.shape[1], runner.family.stream_width
        self.original, self.quantized = (
            HiddenStates(self.sizes, shape, runner.device, place, dtype) for _ in ("original", "quantized")
        )
        for index, hidden in zip(self.own, runner.embed_all([batches[index] for index in self.own]), strict=True):
            self.original[index] = self.quantized[index] = hidden

    def __len__(self) -> int:
        return len(self.sizes)

    def advance(self, index: int, original: nn.Module, quantized: nn.Module) -> None:
        """Run both models' hidden states through block number `index`, sublayer by sublayer, as quantizing it does."""
        self._advance(self.original, index, original)
        self.advance_quantized(index, quantized)

    def advance_quantized(self, index: int, quantized: nn.Module) -> None:
        """Run the quantized model's hidden states alone through block number `index`."""
        self._advance(self.quantized, index, quantized)

    def _advance(self, states: HiddenStates, index: int, block: nn.Module) -> None:
        for batch in self.own:
            for sublayer in self.runner.family.block_sublayers(index):
                states[batch] = self.runner.sublayer_forward(block, sublayer, states[batch])
