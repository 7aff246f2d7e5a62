"""A Hugging Face checkpoint on disk: config.json, and the weights in one safetensors file or in indexed shards.

Everything that can be wrong with the files is found here and said in one sentence; tensors are read one at a time,
when they are asked for. This module does not know what a tensor is for: model families say which tensors there must be
(`families`), and the tokenizer files belong to `tokenizer`.
"""

from __future__ import annotations

import json
import math
from collections.abc import KeysView, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from d2q_edge.errors import D2QError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

# Safetensors dtype codes that we read, with their torch dtype.
DTYPES: dict[str, torch.dtype] = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# Tensors that older checkpoints carry although they are derived from the config.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
# The safetensors format's own limit for its JSON header.
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class _Entry:
    """Where one tensor lies: its file, its dtype code as stored ("BF16", ...) and its shape."""

    file: Path
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
        """Read config.json and the headers of all weight files under `path`; no weights are loaded.

        Raises:
            D2QError: no such directory, config.json or weights missing or unreadable, `.bin` weights only, a shard
                missing or truncated, index and shards in disagreement.
        """
        directory = Path(path).expanduser()
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
                f"there is no directory {directory}; models can't be named by their Hugging Face id yet, so download "
                "the model first and give its directory"
            )
        config_file = directory / "config.json"
        if not config_file.is_file():
            raise D2QError(f"{directory} has no config.json, so it isn't a Hugging Face model directory")
        return cls(directory, read_json_object(config_file), _read_entries(directory))

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
                tensor: torch.Tensor = file.get_tensor(name)
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
    """Whether no element is NaN or infinite; a part at a time, because the test makes copies."""
    return all(bool(part.isfinite().all()) for part in tensor.reshape(-1).split(1 << 24))


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file whose top level is an object.

    Raises:
        D2QError: the file can't be read, isn't JSON, or isn't an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise D2QError(f"can't read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise D2QError(f"{path} isn't valid JSON ({error}); the download may be incomplete") from error
    if not isinstance(value, dict):
        raise D2QError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def _read_entries(directory: Path) -> dict[str, _Entry]:
    """Find the weight files and read their headers. The index wins over a single file, as in llama.cpp's converter."""
    if (directory / INDEX_FILE).is_file():
        return _read_shards(directory)
    if (directory / SINGLE_FILE).is_file():
        return _read_header(directory / SINGLE_FILE)
    if any(directory.glob("model-*-of-*.safetensors")):
        raise D2QError(f"{directory} has safetensors shards but no {INDEX_FILE}; download the index too")
    if any(any(directory.glob(pattern)) for pattern in ("*.bin", "*.pt", "*.pth")):
        raise D2QError(
            f"{directory} holds its weights as PyTorch pickle files only, which can run any code when they are loaded; "
            "use or make a safetensors version"
        )
    raise D2QError(f"{directory} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there")


def _read_shards(directory: Path) -> dict[str, _Entry]:
    """Read the headers of all shards that the index names, and check that index and shards agree exactly."""
    index = directory / INDEX_FILE
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise D2QError(f"{index} has no weight_map that says which tensor is in which file")
    planned: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or "/" in file or "\\" in file:
            raise D2QError(
                f"{index} places tensor {name} in {file!r}, which isn't the plain name of a .safetensors file"
            )
        planned.setdefault(file, set()).add(name)
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
        if absent := sorted(planned[file] - found.keys()):
            raise D2QError(f"{index} says that {file} holds tensor {absent[0]}, but it doesn't; download both again")
        if extra := sorted(found.keys() - planned[file]):
            raise D2QError(f"{file} holds tensor {extra[0]}, but {index} doesn't say so; download both again")
        entries.update(found)
    return entries


def _read_header(file: Path) -> dict[str, _Entry]:
    """Parse one safetensors header: u64 length, JSON {name: {dtype, shape, data_offsets}}; then comes the data."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise D2QError(f"{file} is truncated or isn't a safetensors file; download it again")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise D2QError(f"can't read {file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise D2QError(f"{file} has a damaged header ({error}); download it again") from error
    if not isinstance(header, dict):
        raise D2QError(f"{file} has a damaged header; download it again")
    header.pop("__metadata__", None)
    entries = {}
    for name in sorted(header):
        entry, end = _parse_entry(file, name, header[name])
        if 8 + length + end > size:
            raise D2QError(
                f"{file} is truncated: it ends after {size} bytes, before the end of tensor {name}; download it again"
            )
        entries[name] = entry
    return entries


def _parse_entry(file: Path, name: str, value: object) -> tuple[_Entry, int]:
    """One tensor's header entry, and the end of its bytes relative to the start of the data."""
    if isinstance(value, dict):
        dtype, shape, offsets = value.get("dtype"), _sizes(value.get("shape")), _sizes(value.get("data_offsets"))
        if isinstance(dtype, str) and shape is not None and offsets is not None and len(offsets) == 2:
            begin, end = offsets
            known = DTYPES.get(dtype)
            if begin <= end and (known is None or end - begin == math.prod(shape) * known.itemsize):
                return _Entry(file, dtype, shape), end
    raise D2QError(f"{file} describes tensor {name} in a way that makes no sense; download it again")


def _sizes(value: object) -> tuple[int, ...] | None:
    """The value as a tuple if it is a list of whole numbers that aren't negative."""
    if isinstance(value, list) and all(type(item) is int and item >= 0 for item in value):
        return tuple(value)
    return None
