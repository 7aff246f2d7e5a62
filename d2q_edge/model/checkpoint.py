"""A Hugging Face checkpoint on disk: config.json, and the weights in one safetensors file or in indexed shards.

Everything that can be wrong with the files is found here and said in one sentence; tensors are read one at a time,
when they are asked for. The files are strangers': a header must describe every byte of its file exactly once, an index
must agree with its shards, and no symbolic link may lead out of the model's directory, because what it leads to would
end up in a file that is meant to be given away. This module does not know what a tensor is for: model families say
which tensors there must be (`families`), and the tokenizer files belong to `tokenizer`. hub.py knows Hugging Face ids.
"""

from __future__ import annotations

import math
from collections.abc import KeysView, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from d2q_edge.errors import D2QError
from d2q_edge.model.hub import INDEX_FILE, PICKLES, SINGLE_FILE, blob_directories, locate, weight_files
from d2q_edge.model.text_part import has_text_part, text_config, text_names
from d2q_edge.utils.json_files import parse_json, read_json_object

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

# Safetensors dtype codes that we read, with their torch dtype.
DTYPES: dict[str, torch.dtype] = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# Tensors that older checkpoints carry although they are derived from the config.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
# The safetensors format's own limit for its JSON header.
MAX_HEADER_BYTES = 100_000_000
# More dimensions than any tensor has, and longer names.
MAX_DIMS, MAX_NAME = 8, 1000
# The kinds of files that are read from a model's directory, here and in `tokenizer`, `convert` and `export`.
READ_SUFFIXES = (".json", ".safetensors", ".model", ".jinja", ".txt", ".md")


@dataclass(frozen=True)
class _Entry:
    """Where one tensor lies: its file and its name there, its dtype code as stored ("BF16", ...) and its shape."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


class Checkpoint:
    """An opened checkpoint directory. Make one with `Checkpoint.open`."""

    def __init__(self, directory: Path, config: dict[str, Any], entries: dict[str, _Entry]) -> None:
        self.directory = directory
        self.config = config
        self._entries = entries

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read config.json and the headers of all weight files of a model; no weights are loaded.

        Args:
            path: a directory, or a Hugging Face id (`hub.locate`).

        Raises:
            D2QError: no such directory, and no model of that id that can be fetched; config.json or weights missing or
                unreadable, `.bin` weights only, a shard missing, truncated or with bytes that belong to no tensor or to
                two, index and shards in disagreement, a symbolic link out of the directory.
        """
        directory = locate(path)
        try:
            return cls._open(directory)
        except OSError as error:
            raise D2QError(f"can't read {directory}: {error.strerror or error}") from error

    @classmethod
    def _open(cls, directory: Path) -> Checkpoint:
        if not directory.is_dir():
            if directory.exists():
                raise D2QError(f"{directory} is not a directory; give the directory that holds config.json")
            raise D2QError(
                f"there is no directory {directory}; give one that holds config.json, or a Hugging Face id like "
                "Qwen/Qwen3-8B"
            )
        config_file = directory / "config.json"
        if not config_file.is_file():
            raise D2QError(f"{directory} has no config.json, so it isn't a Hugging Face model directory")
        _check_links(directory)
        config, entries = read_json_object(config_file, strict=True), _read_entries(directory)
        if has_text_part(config):
            config = text_config(config)
            entries = {name: entries[stored] for name, stored in text_names(entries).items()}
        return cls(directory, config, entries)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on what one should know about the files."""
        read, other = self.directory / SINGLE_FILE, self.directory / INDEX_FILE
        notes = []
        if read.is_file() and other.is_file():
            notes.append(f"{self.directory} has {SINGLE_FILE} and {INDEX_FILE}; the former is read, as by transformers")
        if any(name != entry.name for name, entry in self._entries.items()):
            notes.append("the model's part for images is left out; the file is for text")
        return tuple(notes)

    @property
    def names(self) -> KeysView[str]:
        """All tensor names, set-like; in iteration sorted by name within a file, files in the order of their names."""
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without loading it.

        Raises:
            D2QError: there is no such tensor.
        """
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype of a tensor, without loading it: bfloat16, float16 or float32.

        Raises:
            D2QError: there is no such tensor, or it is stored in a dtype that isn't supported.
        """
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
            D2QError: no such tensor, unsupported dtype, unreadable file, or a value that is NaN or infinite.
        """
        self.dtype(name)
        entry = self._entry(name)
        try:
            with safetensors.safe_open(entry.file, framework="pt", device="cpu") as file:
                tensor: torch.Tensor = file.get_tensor(entry.name)
        except (OSError, safetensors.SafetensorError) as error:
            raise D2QError(f"can't read tensor {name} from {entry.file}: {error}") from error
        if not _is_finite(tensor):
            raise D2QError(f"tensor {name} in {entry.file} contains NaN or infinite values; the checkpoint is damaged")
        return tensor

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compare the checkpoint with the tensors that its model must have (`Family.tensor_shapes()`).

        A `lm_head.weight` beside tied embeddings is accepted when it equals them; it is redundant then.

        Raises:
            D2QError: a tensor is missing, unexpected, of an unsupported dtype, or of another shape than config.json
                implies.
        """
        for name, expected in shapes.items():
            if name not in self._entries:
                raise D2QError(f"{self.directory} has no tensor {name}, which its config.json calls for")
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

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise D2QError(f"{self.directory} has no tensor {name}") from None


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN, which the extremes would be too, or infinite. (`isfinite` takes 20 times as long.)"""
    return tensor.numel() == 0 or all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def _read_entries(directory: Path) -> dict[str, _Entry]:
    """Find the weight files and read their headers. A single file wins over an index, as in transformers."""
    if (directory / SINGLE_FILE).is_file():
        return _read_header(directory / SINGLE_FILE)
    if (directory / INDEX_FILE).is_file():
        return _read_shards(directory)
    if any(directory.glob("model-*-of-*.safetensors")):
        raise D2QError(f"{directory} has safetensors shards but no {INDEX_FILE}; download the index too")
    if any(file.suffix in PICKLES for file in directory.iterdir()):
        raise D2QError(
            f"{directory} holds its weights as PyTorch pickle files only, which can run any code when they are loaded; "
            "use or make a safetensors version"
        )
    raise D2QError(f"{directory} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there")


def _read_shards(directory: Path) -> dict[str, _Entry]:
    """Read the headers of all shards that the index names, and check that index and shards agree exactly."""
    index = directory / INDEX_FILE
    files = weight_files(index)
    weight_map = read_json_object(index, strict=True)["weight_map"]
    planned: dict[str, set[str]] = {file: set() for file in files}
    for name, file in weight_map.items():
        planned[file].add(name)
    missing = sorted(file for file in planned if not (directory / file).is_file())
    if missing:
        raise D2QError(
            f"{directory} lacks {missing[0]}"
            + (f" and {len(missing) - 1} more of its {len(planned)} shards" if len(missing) > 1 else "")
            + "; complete the download"
        )
    entries: dict[str, _Entry] = {}
    for file in sorted(planned):
        found = _read_header(directory / file)
        if absent := _needed(planned[file] - found.keys()):
            raise D2QError(f"{index} says that {file} holds tensor {absent[0]}, but it doesn't; download both again")
        if extra := _needed(found.keys() - planned[file]):
            raise D2QError(f"{file} holds tensor {extra[0]}, but {index} doesn't say so; download both again")
        entries.update(found)
    return entries


def _needed(names: set[str]) -> list[str]:
    """Those of some tensor names that a model can't do without, sorted; shards and index differ in others at times."""
    return sorted(name for name in names if not name.endswith(IGNORED_SUFFIXES))


def _check_links(directory: Path) -> None:
    """Refuse symbolic links that lead out of the directory; in the hub's cache all do, and must lead to its contents.

    Raises:
        D2QError: one does.
    """
    root = directory.resolve()
    for file in sorted([*directory.iterdir(), *(directory / "additional_chat_templates").glob("*")]):
        if file.suffix in READ_SUFFIXES:
            target = file.resolve()
            if not any(target.is_relative_to(place) for place in (root, *blob_directories(directory))):
                raise D2QError(
                    f"{file} is a symbolic link to {target}, outside of the model's directory; copy the file there if "
                    "you trust it"
                )


def _read_header(file: Path) -> dict[str, _Entry]:
    """Parse one safetensors header: u64 length, JSON {name: {dtype, shape, data_offsets}}; then comes the data."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise D2QError(f"{file} is truncated or isn't a safetensors file; download it again")
            if length > MAX_HEADER_BYTES:
                raise D2QError(f"{file} has a header of {length} bytes, more than the format allows")
            header = parse_json(stream.read(length), strict=True)
    except OSError as error:
        raise D2QError(f"can't read {file}: {error.strerror or error}") from error
    except ValueError as error:
        raise D2QError(f"{file} has a damaged header ({error}); download it again") from error
    if not isinstance(header, dict):
        raise D2QError(f"{file} has a damaged header; download it again")
    header.pop("__metadata__", None)
    entries, extents = {}, []
    for name in sorted(header):
        if not name.isprintable() or len(name) > MAX_NAME:
            raise D2QError(f"{file} holds a tensor named {name[:MAX_NAME]!r}, which no model has")
        entries[name], begin, end = _parse_entry(file, name, header[name])
        extents.append((begin, end, name))
    _check_extents(file, sorted(extents), size - 8 - length)
    return entries


def _check_extents(file: Path, extents: list[tuple[int, int, str]], size: int) -> None:
    """The tensors must fill the data without gaps or overlaps, as the format says."""
    position = 0
    for begin, end, name in extents:
        if end > size:
            missing = end - size
            raise D2QError(f"{file} is truncated: {missing} bytes of tensor {name} are missing; download it again")
        if begin != position:
            what = "overlaps another one" if begin < position else "has unused bytes before it"
            raise D2QError(f"{file} is damaged: tensor {name} {what}; download it again")
        position = end
    if position != size:
        raise D2QError(f"{file} is damaged: {size - position} bytes at its end belong to no tensor; download it again")


def _parse_entry(file: Path, name: str, value: object) -> tuple[_Entry, int, int]:
    """One tensor's header entry, and where its bytes begin and end in the data."""
    if isinstance(value, dict):
        dtype, shape, offsets = value.get("dtype"), _sizes(value.get("shape")), _sizes(value.get("data_offsets"))
        if isinstance(dtype, str) and dtype.isidentifier() and shape is not None and offsets is not None:
            known = DTYPES.get(dtype)
            if len(offsets) == 2 and len(shape) <= MAX_DIMS:
                begin, end = offsets
                if begin <= end and (known is None or end - begin == math.prod(shape) * known.itemsize):
                    return _Entry(file, name, dtype, shape), begin, end
    raise D2QError(f"{file} describes tensor {name} in a way that makes no sense; download it again")


def _sizes(value: object) -> tuple[int, ...] | None:
    """The value as a tuple if it is a list of whole numbers that aren't negative."""
    if isinstance(value, list) and all(type(item) is int and item >= 0 for item in value):
        return tuple(value)
    return None
