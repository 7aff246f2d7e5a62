"""Write GGUF files (ggml/docs/gguf.md): tensors of stock types and of ours, streamed to disk one after the other.

gguf-py's writer collects the keys and knows their value types; the header is packed here, because gguf-py packs arrays
item by item (a second for a large vocabulary). gguf-py also encodes the stock types, except K-quants (k_quants.py).
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import numpy.typing as npt
import torch

from d2q_edge.errors import D2QError
from d2q_edge.formats import k_quants, tensor_types
from d2q_edge.formats.gguf_reader import SCALAR_FORMATS, TYPES
from d2q_edge.utils import files
from d2q_edge.utils.locks import open_locked
from d2q_edge.utils.progress import Progress

STOCK_TYPES: dict[str, gguf.GGMLQuantizationType] = {
    name.lower(): gguf.GGMLQuantizationType[name]
    for name in ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_1", "Q5_K", "Q5_0", "Q4_1", "Q4_K", "Q4_0")
}
"""The stock types that can be written, by lower-case name, best first."""
TYPE_IDS: dict[str, int] = {**STOCK_TYPES, **{name: own.id for name, own in tensor_types.BY_NAME.items()}}
"""Every type that can be written, with its number in GGUF files."""
FALLBACKS = {"q6_k": "q8_0", "q5_k": "q5_1", "q4_k": "q5_0"}
"""What takes the place of K-quants where 256 doesn't divide the width, as in llama-quantize."""
ALIGNMENT: int = gguf.GGUF_DEFAULT_ALIGNMENT
Load = Callable[[], npt.NDArray[Any] | torch.Tensor]
AddMetadata = Callable[[gguf.GGUFWriter], None]
"""Adds all keys but general.architecture to gguf-py's writer, which knows the tensors' shapes."""


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor to write. `shape` is in numpy's order, (rows, columns) for a matrix.

    `load` is called once, when it is the tensor's turn. It returns the encoded bytes, uint8 [rows, bytes per row], or,
    for stock types, floats of `shape` to encode: an array, or a torch tensor of any float dtype on any device. The
    `parts` of a stack are loaded and written one after the other.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    load: Load
    parts: tuple[GGUFTensor, ...] = ()

    @classmethod
    def stack(cls, name: str, parts: Sequence[GGUFTensor]) -> GGUFTensor:
        """Return a tensor [parts, *shape] of tensors of one shape and type; others are a ValueError."""
        kinds = {(part.shape, part.type) for part in parts}
        if len(kinds) != 1:
            raise ValueError(f"{name}: the parts of a stack must be of one shape and type, not {sorted(kinds)}")
        ((shape, kind),) = kinds
        whole = (len(parts), *shape)
        return cls(name, whole, kind, lambda: np.stack([encode(part).view(np.uint8) for part in parts]), tuple(parts))

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without padding.

        Raises:
            D2QError: unknown type, or the type's block size doesn't divide the width.
        """
        (block, size), width = block_and_type_size(self.type), self.shape[-1]
        if width % block:
            raise D2QError(f"tensor {self.name} can't be {self.type}: {block} doesn't divide its width {width}")
        return math.prod(self.shape) // block * size


def block_and_type_size(type_name: str) -> tuple[int, int]:
    """Return weights per block and bytes per block of a type that can be written.

    Raises:
        D2QError: there is no such type.
    """
    if type_name not in TYPE_IDS:
        raise D2QError(f"the tensor type {type_name!r} can't be written; these can: {', '.join(TYPE_IDS)}")
    return TYPES[TYPE_IDS[type_name]][1:]


def fitting_type(type_name: str, width: int) -> str:
    """Return this type, or what llama-quantize takes in its place where its block size doesn't divide the width."""
    for kind in (type_name, FALLBACKS.get(type_name, "f16")):
        if width % block_and_type_size(kind)[0] == 0:
            return kind
    return "f16"


def encode(tensor: GGUFTensor) -> npt.NDArray[Any]:
    """Load a tensor and encode it; the result's bytes are the file's.

    Raises:
        D2QError: a value is too large for float16.
        ValueError: `load` returned something of another shape or size than promised.
    """
    data = tensor.load()
    if isinstance(data, torch.Tensor) or data.dtype != np.uint8:
        if tensor.type not in STOCK_TYPES:
            raise ValueError(f"{tensor.name}: {tensor.type} must be packed by the caller")
        if data.shape != tensor.shape:
            raise ValueError(f"{tensor.name}: expected the shape {tensor.shape}, not {tuple(data.shape)}")
        data = _encode_floats(tensor, data)
    if data.nbytes != tensor.nbytes:
        raise ValueError(f"{tensor.name}: expected {tensor.nbytes} bytes of {tensor.type}, not {data.nbytes}")
    return data


def _encode_floats(tensor: GGUFTensor, values: npt.NDArray[Any] | torch.Tensor) -> npt.NDArray[Any]:
    if tensor.type in k_quants.ENCODERS:
        rows = torch.as_tensor(values).reshape(-1, tensor.shape[-1])
        packed: npt.NDArray[np.uint8] = k_quants.encode(tensor.type, rows).cpu().numpy()
        return packed
    floats = values.cpu().float().numpy() if isinstance(values, torch.Tensor) else values
    if tensor.type == "f16":
        with np.errstate(over="ignore"):  # the check below says it better
            halves = floats.astype(np.float16)
        if not np.isfinite(halves).all():
            raise D2QError(f"tensor {tensor.name} has values too large for float16; use bf16, q8_0 or f32 instead")
        return halves
    encoded: npt.NDArray[Any] = gguf.quants.quantize(floats.astype(np.float32, copy=False), STOCK_TYPES[tensor.type])
    return encoded


def data_size(tensors: Sequence[GGUFTensor]) -> int:
    """Return the bytes of all tensors in the file with padding; the file is larger by its header."""
    return sum(tensor.nbytes + _padding(tensor.nbytes) for tensor in tensors)


def check_output(path: Path, *, force: bool, size: int = 0) -> None:
    """Find out before the work whether a file of `size` bytes can be written; leave nothing behind.

    Raises:
        D2QError: the directory is missing or not writable, the file exists (and not `force`), or too little space.
    """
    try:
        if path.is_dir():
            raise D2QError(f"{path} is a directory; give the name of the file to write")
        if path.exists() and not path.is_file():
            raise D2QError(f"{path} isn't a regular file; give the name of a file to write")
        if not path.parent.is_dir():
            raise D2QError(f"the output directory {path.parent} doesn't exist; create it first")
        if path.exists() and not force:
            raise D2QError(f"{path} exists already; use --force to replace it")
        with partial_file(path):
            pass
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise cannot_write(path, error) from error
    if free < size:
        raise D2QError(
            f"{path.parent} has {free / 2**20:.0f} MiB of free space, but the output needs {size / 2**20:.0f} MiB"
        )


def file_size(arch: str, tensors: Sequence[GGUFTensor], add_metadata: AddMetadata) -> int:
    """Return the bytes of the file that `write_gguf` would write; no tensor is loaded.

    Raises:
        D2QError: the metadata can't be written.
    """
    return len(_header(arch, tensors, add_metadata)) + data_size(tensors)


def write_gguf(
    path: Path,
    arch: str,
    tensors: Sequence[GGUFTensor],
    add_metadata: AddMetadata,
    *,
    force: bool = False,
    check: Callable[[Path], None] | None = None,
) -> int:
    """Write a GGUF into a temporary file beside `path`, which takes its name when it is complete; return its bytes.

    The file has the architecture `arch` and the tensors in this order; `force` lets it replace another. `check` is
    called with the complete file before it takes its name, and raises where the file is no good.

    Raises:
        D2QError: as in `check_output` and `encode`, the metadata can't be written, or the disk fills up. Whatever is
            raised, nothing is left behind.
    """
    size = data_size(tensors)
    check_output(path, force=force, size=size)
    header = _header(arch, tensors, add_metadata)
    try:
        with partial_file(path) as partial:
            with partial.open("wb") as file, Progress("Writing", size, "B", unit_scale=True) as progress:
                file.write(header)
                for tensor in tensors:
                    for part in tensor.parts or (tensor,):
                        progress.update(_write_data(file, part))
                    file.write(bytes(_padding(tensor.nbytes)))
            if check is not None:
                check(partial)
            files.replace(partial, path)
        return path.stat().st_size
    except OSError as error:
        raise cannot_write(path, error) from error


def _write_data(file: BinaryIO, tensor: GGUFTensor) -> int:
    """Write a tensor's data and return its size; its memory is free again before the next one is loaded."""
    data = np.ascontiguousarray(encode(tensor))
    file.write(data.reshape(-1).view(np.uint8).data)
    return data.nbytes


def _padding(size: int) -> int:
    return -size % ALIGNMENT


def _header(arch: str, tensors: Sequence[GGUFTensor], add_metadata: AddMetadata) -> bytes:
    """Return everything before the tensors' data, padded."""
    writer = gguf.GGUFWriter(path=None, arch=arch)
    infos, offset = [], 0
    for tensor in tensors:
        type_id, dims = TYPE_IDS[tensor.type], len(tensor.shape)
        # For its count of parameters; a float dtype keeps it from computing shapes by a type that it doesn't know.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, type_id)
        info = struct.pack(f"<I{dims}QIQ", dims, *tensor.shape[::-1], type_id, offset)
        infos.append(pack_string(tensor.name) + info)
        offset += tensor.nbytes + _padding(tensor.nbytes)
    try:
        add_metadata(writer)
        (keys,) = writer.kv_data
        packed = [
            pack_string(key) + struct.pack("<I", entry.type) + pack_value(entry.value, entry.type, entry.sub_type)
            for key, entry in keys.items()
        ]
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, OverflowError, struct.error) as error:
        raise D2QError(
            f"the model's metadata can't be written ({type(error).__name__}: {error}); a value in README.md, "
            "generation_config.json or the tokenizer's files is of the wrong kind"
        ) from error
    head = struct.pack("<4sIQQ", b"GGUF", gguf.GGUF_VERSION, len(tensors), len(keys))
    header = b"".join([head, *packed, *infos])
    return header + bytes(_padding(len(header)))


def pack_value(value: Any, kind: gguf.GGUFValueType, item_kind: gguf.GGUFValueType | None = None) -> bytes:
    """Pack a key's value, without the number of its type; raise what `_header` catches if it isn't of that type.

    A memoryview has the bytes of a value that is packed already, from another file.
    """
    if isinstance(value, memoryview):
        return bytes(value)
    if kind in SCALAR_FORMATS:
        return struct.pack(f"<{SCALAR_FORMATS[kind]}", value)
    if kind == gguf.GGUFValueType.STRING:
        return pack_string(value)
    if not isinstance(value, Sequence) or not value:
        raise ValueError("an array must be a sequence that isn't empty")
    if item_kind is None and isinstance(value, bytes):
        item_kind = gguf.GGUFValueType.UINT8
    elif item_kind is None:
        kinds = {gguf.GGUFValueType.get_type(item) for item in {type(item): item for item in value}.values()}
        if len(kinds) > 1:
            raise ValueError("the items of an array must be of one type")
        (item_kind,) = kinds
    head = struct.pack("<IQ", item_kind, len(value))
    if item_kind in SCALAR_FORMATS:
        return head + struct.pack(f"<{len(value)}{SCALAR_FORMATS[item_kind]}", *value)
    if item_kind == gguf.GGUFValueType.STRING:
        return head + b"".join(map(pack_string, value))
    return head + b"".join([pack_value(item, item_kind) for item in value])


def pack_string(value: str | bytes) -> bytes:
    encoded = value.encode() if isinstance(value, str) else memoryview(value)
    return struct.pack("<Q", len(encoded)) + encoded


@contextmanager
def partial_file(path: Path) -> Iterator[Path]:
    """Create or take over a temporary file beside `path`, lock it, and remove it if it is still there at the end."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        handle, _ = open_locked(partial)
    except BlockingIOError:
        raise D2QError(f"another process is writing {path}; wait until it is done") from None
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)
        os.close(handle)


def cannot_write(path: Path, error: OSError) -> D2QError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return D2QError(f"the disk is full: {path} could not be written; free some space and run the same command")
    return D2QError(f"can't write {path}: {error.strerror or error}")
