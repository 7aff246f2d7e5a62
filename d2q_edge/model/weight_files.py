"""Locate the safetensors files of a checkpoint and validate their headers; no weights are loaded.

The files are untrusted input: a header must describe every byte of its file exactly once, and an index must agree with
its shards. The format is documented at https://github.com/huggingface/safetensors#format.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch

from d2q_edge.errors import D2QError
from d2q_edge.utils.json_files import parse_json, read_json_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILES = "adapter_config.json", "adapter_model.safetensors"
"""What a PEFT adapter consists of."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
DTYPES: dict[str, torch.dtype] = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""The safetensors dtype codes of ordinary weights."""
ITEM_SIZES: dict[str, int] = {
    **{code: dtype.itemsize for code, dtype in DTYPES.items()},
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **{"I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8, "F64": 8},
}
"""Bytes of an element, of these and of the dtypes that quantized checkpoints have."""
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
"""Tensors of older checkpoints that can be computed from config.json."""
# The limit of the safetensors format for its JSON header.
MAX_HEADER_BYTES = 100_000_000
MAX_DIMS, MAX_NAME = 8, 1000


@dataclass(frozen=True)
class TensorEntry:
    """The header entry of one tensor."""

    file: Path
    name: str  # in the file
    dtype: str  # "BF16", ...
    shape: tuple[int, ...]

    def load(self) -> torch.Tensor:
        """Read the tensor in its stored dtype; raise D2QError if that fails."""
        try:
            with safetensors.safe_open(self.file, framework="pt", device="cpu") as file:
                tensor: torch.Tensor = file.get_tensor(self.name)
        except (OSError, safetensors.SafetensorError) as error:
            raise D2QError(f"can't read tensor {self.name} from {self.file}: {error}") from error
        return tensor


def indexed_files(index: Path) -> list[str]:
    """Return the sorted names of an index's weight files; raise D2QError if it is damaged or a name isn't plain."""
    return sorted(set(_read_weight_map(index).values()))


def read_headers(directory: Path) -> dict[str, TensorEntry]:
    """Return the entries of all weight files' headers by tensor name, sorted by file, then by name.

    model.safetensors wins over an index, as in transformers.

    Raises:
        D2QError: there are no weights, only pickles, or a file is missing, damaged, or contradicts the index.
        OSError: the directory can't be read.
    """
    if (directory / SINGLE_FILE).is_file():
        return read_header(directory / SINGLE_FILE)
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


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index, strict=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise D2QError(f"{index} has no weight_map that says which tensor is in which file")
    for name, file in weight_map.items():
        plain = isinstance(file, str) and re.fullmatch(r"[\w+-][\w.+ -]*\.safetensors", file)
        if not plain or not name.isprintable():
            raise D2QError(
                f"{index} places tensor {name!r} in {file!r}, which isn't the plain name of a .safetensors file"
            )
    return weight_map


def _read_shards(directory: Path) -> dict[str, TensorEntry]:
    index = directory / INDEX_FILE
    planned: dict[str, set[str]] = {}
    for name, file in _read_weight_map(index).items():
        planned.setdefault(file, set()).add(name)
    if missing := sorted(file for file in planned if not (directory / file).is_file()):
        more = f" and {len(missing) - 1} more of its {len(planned)} shards" if len(missing) > 1 else ""
        raise D2QError(f"{directory} lacks {missing[0]}{more}; complete the download")
    entries: dict[str, TensorEntry] = {}
    for file in sorted(planned):
        found = read_header(directory / file)
        if absent := _required(planned[file] - found.keys()):
            raise D2QError(f"{index} says that {file} holds tensor {absent[0]}, but it doesn't; download both again")
        if extra := _required(found.keys() - planned[file]):
            raise D2QError(f"{file} holds tensor {extra[0]}, but {index} doesn't say so; download both again")
        entries.update(found)
    return entries


def _required(names: set[str]) -> list[str]:
    return sorted(name for name in names if not name.endswith(IGNORED_SUFFIXES))


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Return the entries of one file by tensor name, sorted; raise D2QError if it can't be read or is damaged.

    A file is a u64 length, then that many bytes of JSON {name: {dtype, shape, data_offsets}}, then the data.
    """
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


def _parse_entry(file: Path, name: str, value: object) -> tuple[TensorEntry, int, int]:
    """Return one tensor's entry, and where its bytes begin and end in the data."""
    match value:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]}:
            whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
            if whole and dtype.isidentifier() and len(shape) <= MAX_DIMS and begin <= end:
                size = ITEM_SIZES.get(dtype)
                if size is None or end - begin == math.prod(shape) * size:
                    return TensorEntry(file, name, dtype, tuple(shape)), begin, end
    raise D2QError(f"{file} describes tensor {name} in a way that makes no sense; download it again")


def _check_extents(file: Path, extents: list[tuple[int, int, str]], size: int) -> None:
    """Require that the tensors fill the data without gaps or overlaps."""
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
