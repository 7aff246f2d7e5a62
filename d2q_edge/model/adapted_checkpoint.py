"""Present a checkpoint with a LoRA adapter (lora.py) merged into its weights as an ordinary checkpoint."""

import torch

from d2q_edge.errors import D2QError
from d2q_edge.model.checkpoint import ALL, Checkpoint, is_finite
from d2q_edge.model.families import family_for
from d2q_edge.model.lora import Adapter, read, read_adapter

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


class AdaptedCheckpoint(Checkpoint):
    """A checkpoint whose weights an adapter changes on demand, one at a time.

    An adapter may change only one of embeddings and lm_head where these are tied, or each in its own way. peft's model
    then computes with two tables, and so must the file's (peft's own merge_and_unload changes both). The config says
    that they aren't tied in that case; make the family from it. The directory stays the original's.
    """

    def __init__(self, source: Checkpoint, adapter: Adapter) -> None:
        """Wrap a checkpoint that was checked against its family's shapes.

        Raises:
            D2QError: the adapter is for a model with other tensors.
        """
        family = family_for(source.config)
        self._source, self._adapter = source, adapter
        self._embedding, self._head = f"{family.embedding}.weight", f"{family.head}.weight"
        self._loras, self._replacements = dict(adapter.loras), dict(adapter.replacements)
        config, entries = source.config, dict(source._entries)
        self._untied = False
        if family.tied_embeddings:
            entries.pop(self._head, None)  # equal to the embeddings, as was checked
            self._untied = self._unties()
        if self._untied:
            config = {**config, "tie_word_embeddings": False}
            # First, as in checkpoints that have an lm_head: names are sorted.
            entries = {self._head: entries[self._embedding], **entries}
        super().__init__(source.directory, config, entries, [*source.notes, *self._own_notes()])
        self.gguf = source.gguf
        for name, lora in self._loras.items():
            self._check_target(name, lora.shape)
        for name, entry in self._replacements.items():
            self._check_target(name, entry.shape)

    def tensor(self, name: str) -> torch.Tensor:
        """Load one tensor in its dtype, and merge the adapter into it.

        Raises:
            D2QError: as `Checkpoint.tensor`; or the adapter's tensors can't be read, or hold NaN or infinity.
        """
        dtype = self.dtype(name)
        if name in self._replacements:
            weight = read(self._replacements[name])
        else:
            weight = self._source.tensor(self._embedding if self._untied and name == self._head else name)
        # Computed in float32 and rounded once. peft rounds the change to the weight's dtype, and the sum again.
        merged = (self._loras[name].merge(weight) if name in self._loras else weight).to(dtype)
        if merged is not weight and not is_finite(merged):
            raise D2QError(f"the adapter {self._adapter.directory} makes tensor {name} NaN or infinite; it is damaged")
        return merged

    def part(self, name: str, rows: slice = ALL, columns: slice = ALL) -> torch.Tensor:
        if name in self._loras or name in self._replacements or name not in self._source.names:
            return self.tensor(name)[rows, columns]
        return self._source.part(name, rows, columns)

    def _unties(self) -> bool:
        """Return whether the adapter makes two tables of one, and forget changes of lm_head that follow the other's."""
        tables = self._embedding, self._head
        changed = [name for name in tables if name in self._loras or name in self._replacements]
        if not changed:
            return False
        same = self._adapter.tied and self._embedding in changed
        if not same and len(changed) == 2 and not any(name in self._loras for name in tables):
            embedding, head = (read(self._replacements[name]).float() for name in tables)
            same = torch.equal(embedding, head)
        if same:
            self._loras.pop(self._head, None)
            self._replacements.pop(self._head, None)
        return not same

    def _check_target(self, name: str, shape: tuple[int, ...]) -> None:
        where, base = self._adapter.directory, self._adapter.base or "another model"
        if name not in self._entries:
            raise D2QError(
                f"the adapter {where} changes {name}, but the model in {self.directory} has no such tensor; it was "
                f"trained on {base}"
            )
        if shape == self.shape(name):
            return
        more = ""
        if name in (self._embedding, self._head):
            more = "; if tokens were added in training, add them to the model and its tokenizer first"
        raise D2QError(
            f"the adapter {where} has a {name} of shape {list(shape)}, not {list(self.shape(name))} as the model; "
            f"it was trained on {base}{more}"
        )

    def _own_notes(self) -> list[str]:
        adapter = self._adapter
        count = len({*self._loras, *self._replacements})
        trained = f", which was trained on {adapter.base}," if adapter.base else ""
        notes = [f"the adapter {adapter.directory}{trained} changes {count} tensors"]
        if self._untied:
            notes.append("the adapter changes embeddings and lm_head differently, so that the file has both")
        if any((adapter.directory / name).is_file() for name in _TOKENIZER_FILES):
            notes.append(f"the tokenizer is the model's; that in {adapter.directory} is not read")
        return [*notes, *adapter.notes]


def adapted(checkpoint: Checkpoint, adapter: str | None) -> Checkpoint:
    """Return a checkpoint, checked against its family's shapes, with an adapter merged into it.

    Without an adapter, that is the checkpoint itself. One may also be given by its id of the hub.

    Raises:
        D2QError: the adapter can't be read or merged, or isn't for this model.
    """
    if adapter is None:
        return checkpoint
    try:
        return AdaptedCheckpoint(checkpoint, read_adapter(adapter))
    except OSError as error:
        raise D2QError(f"can't read {adapter}: {error.strerror or error}") from error
