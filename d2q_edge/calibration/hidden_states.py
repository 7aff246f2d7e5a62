"""Hidden states of all calibration tokens at one place of a model, batch by batch.

Knows where they are kept: on the device that computes, in the computer's memory, or in a file without a name, which
vanishes with the process. Does not know what they mean; pipeline.py moves them past one half of a block after another.
They are bfloat16, as in most models' own inference: the KL divergence of the finished models did not change measurably
against float32 (docs/accuracy.md).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import torch

from d2q_edge.errors import D2QError

DTYPE = torch.bfloat16
Place: TypeAlias = torch.device | Path
"""Where a stream's batches are kept."""


class Stream:
    """Hidden states of numbered batches; `stream[i]` is float32 [windows, context, hidden] on the device."""

    def __init__(self, windows: Sequence[int], shape: tuple[int, int], device: torch.device, place: Place) -> None:
        """Make room.

        Args:
            windows: of every batch, how many it has.
            shape: (context, hidden).
            device: where batches are wanted.
            place: where they are kept: a torch device, or a directory for a file.

        Raises:
            D2QError: the file can't be made.
        """
        self.device, self._shape, self._windows = device, shape, tuple(windows)
        self._bytes = [count * shape[0] * shape[1] * DTYPE.itemsize for count in windows]
        self._place = place
        self._kept: dict[int, torch.Tensor] = {}
        if isinstance(place, Path):
            try:
                place.mkdir(parents=True, exist_ok=True)
                # Open as long as the stream lives.
                self._file = tempfile.TemporaryFile(dir=place, buffering=0)  # noqa: SIM115
            except OSError as error:
                raise D2QError(f"can't keep hidden states in {place}: {error.strerror or error}") from error

    def __len__(self) -> int:
        return len(self._windows)

    def tokens(self, index: int) -> int:
        """How many tokens batch `index` has."""
        return self._windows[index] * self._shape[0]

    def __getitem__(self, index: int) -> torch.Tensor:
        if isinstance(self._place, Path):
            buffer = bytearray(self._bytes[index])
            self._file.seek(sum(self._bytes[:index]))
            if self._file.readinto(buffer) != len(buffer):
                raise D2QError(f"hidden states kept in {self._place} can't be read back; is the disk full?")
            kept = torch.frombuffer(buffer, dtype=DTYPE).view(self._windows[index], *self._shape)
        else:
            kept = self._kept[index]
        return kept.to(self.device).float()

    def __setitem__(self, index: int, hidden: torch.Tensor) -> None:
        kept = hidden.detach().to(DTYPE)
        if not isinstance(self._place, Path):
            self._kept[index] = kept.to(self._place)
            return
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
