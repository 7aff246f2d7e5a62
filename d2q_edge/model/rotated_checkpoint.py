"""Present a checkpoint with a rotated residual stream (quantize/rotation.py) as an ordinary checkpoint."""

from typing import Any

import torch

from d2q_edge.errors import D2QError
from d2q_edge.model.checkpoint import ALL, Checkpoint
from d2q_edge.model.families import Family, family_for
from d2q_edge.quantize.rotation import Rotation


def rotation_pays(family: Family) -> bool:
    """Decide `--rotation auto`: never, because the codebooks gained nothing from it on the models measured so far
    (docs/accuracy.md), and untying tied embeddings costs the bytes of an lm_head."""
    return False


class RotatedCheckpoint(Checkpoint):
    """A checkpoint whose tensors are rotated on demand, one at a time.

    By default all tensors are float32, so that nothing is rounded to the 16 bits of the original. The config is the
    original's with untied embeddings: make the family of the rotated model from it. The directory stays the original's.
    """

    def __init__(self, source: Checkpoint, seed: int, dtype: torch.dtype = torch.float32) -> None:
        """Wrap a checkpoint that was checked against its family's shapes; `seed` is for the rotation's random signs.

        Raises:
            D2QError: the config isn't one of a supported family, or rotation isn't exact for the family.
        """
        original = family_for(source.config)
        self._tied = original.tied_embeddings
        config: dict[str, Any] = {**source.config, **dict.fromkeys(original.tied_keys, False)}
        family = family_for(config)
        if not family.can_rotate:
            raise D2QError(
                f"models of the architecture {family.gguf_arch} can't be rotated without changing what they compute; "
                "leave out --rotation on"
            )
        self._source, self._dtype = source, dtype
        self._rotation = Rotation(family.hidden_size, seed)
        self._embedding, self._head = f"{family.embedding}.weight", f"{family.head}.weight"
        entries = dict(source._entries)
        if self._tied:
            # First, as in checkpoints that have an lm_head: names are sorted.
            entries = {self._head: entries[self._embedding], **entries}
        super().__init__(source.directory, config, entries, source.notes)
        self.gguf = source.gguf

        self._norm_of = {self._head: f"{family.final_norm}.weight"}
        self._writers: set[str] = set()
        for index in range(family.num_layers):
            prefix = family.block_prefix(index)
            for linear, norm in family.residual_readers(index).items():
                self._norm_of[f"{prefix}{linear}.weight"] = f"{prefix}{norm}.weight"
            self._writers.update(f"{prefix}{linear}" for linear in family.residual_writers(index))
        self._folded, self._offset = set(self._norm_of.values()), family.norm_offset

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of every tensor; raise D2QError as `Checkpoint.dtype`."""
        super().dtype(name)
        return self._dtype

    def part(self, name: str, rows: slice = ALL, columns: slice = ALL) -> torch.Tensor:
        return self.tensor(name)[rows, columns]

    def tensor(self, name: str) -> torch.Tensor:
        """Load and rotate one tensor; raise D2QError as `Checkpoint.tensor`, also for the norm folded into it."""
        self.dtype(name)
        tied = name == self._head and self._tied
        tensor = self._source.tensor(self._embedding if tied else name)
        module, _, kind = name.rpartition(".")
        if name in self._folded:
            return torch.full_like(tensor, 1 - self._offset, dtype=self._dtype)
        if name in self._norm_of:
            norm = self._source.tensor(self._norm_of[name])
            return self._rotation.inputs(tensor, norm.double() + self._offset, self._dtype)
        if module in self._writers and kind == "weight":
            return self._rotation.outputs(tensor, self._dtype)
        if module in self._writers or name == self._embedding:
            return self._rotation.inputs(tensor, None, self._dtype)
        return tensor.to(self._dtype)
