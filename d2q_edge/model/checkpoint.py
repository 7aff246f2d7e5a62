"""Open a Hugging Face checkpoint directory: its config.json and its safetensors weights, which are read on demand.

The directory is untrusted input: no symbolic link may lead out of it, because what it points to would end up in a file
that is meant to be published.
"""

from collections.abc import KeysView, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from d2q_edge.errors import D2QError
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.model.dequantize import ordinary_weights
from d2q_edge.model.families import family_for
from d2q_edge.model.granite4 import granite_config, granite_entries, is_granite4
from d2q_edge.model.hub import locate
from d2q_edge.model.links import check_links
from d2q_edge.model.multimodal import is_multimodal, text_config, text_names
from d2q_edge.model.peft_files import refuse_adapter
from d2q_edge.model.tensor_names import causal_architecture, standard_names
from d2q_edge.model.weight_files import DTYPES, IGNORED_SUFFIXES, INDEX_FILE, SINGLE_FILE, TensorEntry, read_headers
from d2q_edge.utils.json_files import read_json_object

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
GGUF_SUFFIX = ".gguf"
ALL = slice(None)


class Checkpoint:
    """An opened checkpoint directory, or a GGUF file that takes its place; create one with `Checkpoint.open`.

    Attributes:
        directory: the model's, or the GGUF file.
        config: config.json's content, or what it would be.
        gguf: the GGUF file; None for a directory.
    """

    gguf: GGUFFile | None = None

    def __init__(
        self, directory: Path, config: dict[str, Any], entries: dict[str, TensorEntry], notes: Sequence[str] = ()
    ) -> None:
        self.directory, self.config, self._entries, self._notes = directory, config, entries, tuple(notes)

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Read config.json and all weight files' headers of a directory, or of a Hugging Face id (`hub.locate`).

        A GGUF file is opened as a GGUFCheckpoint.

        Raises:
            D2QError: the directory doesn't exist or the id can't be fetched; config.json or weights are missing or
                unreadable; there are only pickles; a shard is missing or damaged, or disagrees with the index; a
                symbolic link leads out of the directory; see also `GGUFCheckpoint.open`.
        """
        directory = locate(path)
        try:
            if directory.suffix == GGUF_SUFFIX and not directory.is_dir():
                from d2q_edge.model.gguf_checkpoint import GGUFCheckpoint  # which imports this module

                return GGUFCheckpoint.open(directory)
            if not directory.is_dir():
                if directory.exists():
                    raise D2QError(
                        f"{directory} is not a directory; give the directory that holds config.json, or a .gguf file"
                    )
                raise D2QError(
                    f"there is no directory {directory}; give one that holds config.json, or a Hugging Face id like "
                    "Qwen/Qwen3-8B"
                )
            refuse_adapter(directory)
            if not (directory / "config.json").is_file():
                files = sorted(directory.glob(f"*{GGUF_SUFFIX}"))
                hint = f"; it holds {files[0].name}: give that file to convert it" if files else ""
                raise D2QError(f"{directory} has no config.json, so it isn't a Hugging Face model directory{hint}")
            check_links(directory)
            config, entries = read_json_object(directory / "config.json", strict=True), read_headers(directory)
        except OSError as error:
            raise D2QError(f"can't read {directory}: {error.strerror or error}") from error
        notes = []
        if (directory / SINGLE_FILE).is_file() and (directory / INDEX_FILE).is_file():
            notes.append(f"{directory} has {SINGLE_FILE} and {INDEX_FILE}; the former is read, as by transformers")
        names, changes = standard_names(entries)
        if is_multimodal(config):
            kinds = "images and sound" if config.get("audio_config") else "images"
            config = text_config(config)
            names = {name: names[full] for name, full in text_names(names).items()}
            notes.append(f"the model's part for {kinds} is left out; the file is for text")
        config = causal_architecture(config)
        entries = {name: entries[stored] for name, stored in names.items()}
        config, entries, more = ordinary_weights(config, entries)
        if is_granite4(config):
            config = granite_config(config)
            entries = granite_entries(entries, dense=not is_granite4(config))
        notes += [*changes, *more]
        if EMBEDDING not in entries and HEAD in entries and family_for(config).tied_embeddings:
            entries = {EMBEDDING if name == HEAD else name: entry for name, entry in entries.items()}
            notes.append(f"there is only {HEAD}; since config.json ties the embeddings to it, it serves as both")
        return cls(directory, config, entries, notes)

    @property
    def notes(self) -> tuple[str, ...]:
        """Return sentences that tell the user what was changed or ignored."""
        return self._notes

    @property
    def weight_files(self) -> list[Path]:
        """Return the files that hold the tensors."""
        return [self.gguf.path] if self.gguf is not None else sorted(self.directory.glob("*.safetensors"))

    @property
    def names(self) -> KeysView[str]:
        """Return all tensor names; iteration goes through the files by name, and through the names within a file."""
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without loading it; raise D2QError if there is no such tensor."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's stored dtype; raise D2QError if it is missing, or not bfloat16, float16 or float32."""
        entry = self._entry(name)
        if entry.dtype not in DTYPES:
            raise D2QError(
                f"tensor {name} in {entry.file} has dtype {entry.dtype}; only BF16, F16 and F32 weights can be "
                "converted, so use a checkpoint that isn't quantized"
            )
        return DTYPES[entry.dtype]

    def tensor(self, name: str) -> torch.Tensor:
        """Load one tensor in its stored dtype; every call reads it again.

        Raises:
            D2QError: the tensor doesn't exist, can't be read, has an unsupported dtype, or holds NaN or infinity.
        """
        self.dtype(name)
        return self._checked(name, self._entries[name].load())

    def part(self, name: str, rows: slice = ALL, columns: slice = ALL) -> torch.Tensor:
        """Load some rows and columns of a matrix; of ordinary weights, no more is read. Raises D2QError as `tensor`."""
        self.dtype(name)
        return self._checked(name, self._entries[name].load()[rows, columns])

    def _checked(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not is_finite(tensor):
            file = self._entries[name].file
            raise D2QError(f"tensor {name} in {file} contains NaN or infinite values; the checkpoint is damaged")
        return tensor

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compare the checkpoint with the names and shapes of the tensors that it must have (`Family.tensor_shapes()`).

        A redundant `lm_head.weight` beside tied embeddings is accepted if it equals them.

        Raises:
            D2QError: a tensor is missing, unexpected, of an unsupported dtype, or of another shape.
        """
        for name, expected in shapes.items():
            if name not in self._entries:
                raise D2QError(_missing(self.directory, name))
            self.dtype(name)
            if (shape := self.shape(name)) != expected:
                raise D2QError(
                    f"tensor {name} has the shape {list(shape)}, but config.json implies {list(expected)}; "
                    "config.json and the weights don't belong together"
                )
        for name in self._entries:
            if name in shapes or name.endswith(IGNORED_SUFFIXES):
                continue
            if name == HEAD and EMBEDDING in shapes:
                if torch.equal(self.tensor(HEAD).float(), self.tensor(EMBEDDING).float()):
                    continue
                raise D2QError(
                    f"config.json says that the embeddings are tied, but {HEAD} differs from {EMBEDDING}; "
                    "set tie_word_embeddings to false or remove the tensor"
                )
            raise D2QError(
                f"tensor {name} in {self._entries[name].file} has no place in this architecture; "
                "converting without it would change the model"
            )

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._entries:
            raise D2QError(f"{self.directory} has no tensor {name}")
        return self._entries[name]


def _missing(directory: Path, name: str) -> str:
    if name != HEAD:
        return f"{directory} has no tensor {name}, which its config.json calls for"
    return (
        f"{directory} has no {HEAD}, and config.json doesn't tie it to the embeddings: transformers would fill it with "
        "random numbers; get the complete checkpoint, or set tie_word_embeddings to true if they were tied in training"
    )


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether no element is NaN or infinite; 20 times as fast as `isfinite`, because the extremes show both."""
    return tensor.numel() == 0 or all(bool(extreme.isfinite()) for extreme in tensor.aminmax())
