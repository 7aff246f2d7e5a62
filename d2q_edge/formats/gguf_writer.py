"""Writing GGUF files: tensors of stock types and of ours, streamed to disk, whole or not at all.

Knows bytes, sizes and files. Does not know models: names, order, types and metadata come from the caller (`export`).
gguf-py lays out header and keys; our tensor types enter by number, because it refuses types that it doesn't know. It
also encodes the stock types, but for those of k_types, which are encoded on the device where their weights are.
"""

from __future__ import annotations

import errno
import functools
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import gguf
import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from d2q_edge.errors import D2QError
from d2q_edge.formats import k_quants, tensor_types
from d2q_edge.formats.pieces import Piece, write_pieces
from d2q_edge.utils import durable
from d2q_edge.utils.file_lock import open_locked

STOCK_TYPES: dict[str, gguf.GGMLQuantizationType] = {
    name.lower(): gguf.GGMLQuantizationType[name]
    for name in ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_1", "Q5_K", "Q5_0", "Q4_1", "Q4_K", "Q4_0")
}
"""The stock types that we can write, by name, best first: those that gguf-py can encode, and those of k_types."""
FALLBACKS = MappingProxyType({"q6_k": "q8_0", "q5_k": "q5_1", "q4_k": "q5_0"})
"""For widths that 256 doesn't divide, as in llama-quantize."""

_ITEMS = MappingProxyType({int: "i", float: "f"})
"""How struct packs what gguf-py makes of an array's items: int32 and float32."""

ALIGNMENT: int = gguf.GGUF_DEFAULT_ALIGNMENT


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor to write.

    `shape` is in numpy's order, (rows, columns) for a matrix. `load` is called once, when it is the tensor's turn, and
    returns either floats of that shape, which are then encoded (stock types only), or the encoded bytes: a numpy array,
    uint8 [rows, bytes per row]. Floats may be torch's, of any float type and on any device. A stack has `parts`, which
    are loaded and written one after the other. Tensors without a `group` are loaded one at a time, in the thread that
    writes the file; those with one may be loaded in another thread at the same time, one at a time of each group.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    load: Callable[[], npt.NDArray[Any] | torch.Tensor]
    parts: tuple[GGUFTensor, ...] = ()
    group: int | None = None

    @classmethod
    def stack(cls, name: str, parts: Sequence[GGUFTensor]) -> GGUFTensor:
        """A tensor [parts, *shape] of tensors of one shape and type; their own names don't matter.

        Raises:
            ValueError: shapes or types differ, or there are no parts.
        """
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
        block, size = block_and_type_size(self.type)
        if self.shape[-1] % block:
            raise D2QError(
                f"tensor {self.name} can't be {self.type}: {block} doesn't divide its width {self.shape[-1]}"
            )
        return math.prod(self.shape) // block * size


def block_and_type_size(type_name: str) -> tuple[int, int]:
    """Weights per block and bytes per block of a type that can be written.

    Raises:
        D2QError: there is no such type.
    """
    if type_name in tensor_types.BY_NAME:
        own = tensor_types.BY_NAME[type_name]
        return own.block_size, own.type_size
    if type_name in STOCK_TYPES:
        block, size = gguf.GGML_QUANT_SIZES[STOCK_TYPES[type_name]]
        return int(block), int(size)
    known = ", ".join(dict.fromkeys([*STOCK_TYPES, *tensor_types.BY_NAME]))
    raise D2QError(f"the tensor type {type_name!r} can't be written; these can: {known}")


def fitting_type(type_name: str, width: int) -> str:
    """This type, or, where its block size doesn't divide the width, what llama-quantize takes in its place."""
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
        values = values if isinstance(values, torch.Tensor) else torch.from_numpy(values)
        packed: npt.NDArray[np.uint8] = k_quants.encode(tensor.type, values.reshape(-1, tensor.shape[-1])).cpu().numpy()
        return packed
    # The rest is gguf-py's and numpy's.
    floats = values.cpu().float().numpy() if isinstance(values, torch.Tensor) else values
    if tensor.type == "f16":
        # The conversion warns and gives infinities; the check below says it better.
        with np.errstate(over="ignore"):
            halves = floats.astype(np.float16)
        if not np.isfinite(halves).all():
            raise D2QError(f"tensor {tensor.name} has values too large for float16; use bf16, q8_0 or f32 instead")
        return halves
    encoded: npt.NDArray[Any] = gguf.quants.quantize(floats.astype(np.float32, copy=False), STOCK_TYPES[tensor.type])
    return encoded


def data_size(tensors: Sequence[GGUFTensor]) -> int:
    """Bytes of all tensors in the file, with padding; the file is larger by its header."""
    return sum(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors)


def check_output(path: Path, *, force: bool, size: int = 0) -> None:
    """Find out before the work whether the result can be written; leaves nothing behind.

    Args:
        path: the file to be written.
        force: whether an existing file may be replaced.
        size: bytes that will be needed.

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
        with _partial_file(path):
            pass
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise _cannot_write(path, error) from error
    if free < size:
        raise D2QError(
            f"{path.parent} has {free / 2**20:.0f} MiB of free space, but the output needs {size / 2**20:.0f} MiB"
        )


def file_size(arch: str, tensors: Sequence[GGUFTensor], add_metadata: Callable[[gguf.GGUFWriter], None]) -> int:
    """Bytes of the file that `write_gguf` would write; the header is written for trial, no tensor is loaded."""
    writer = _make_writer(arch, tensors, add_metadata)
    try:
        with tempfile.TemporaryDirectory() as directory:
            header = Path(directory) / "header.gguf"
            _write_header(writer, header)
            writer.close()
            start = -(-header.stat().st_size // ALIGNMENT) * ALIGNMENT
    except OSError as error:
        raise _cannot_write(Path(tempfile.gettempdir()), error) from error
    finally:
        with suppress(OSError):
            writer.close()
    return start + data_size(tensors)


def write_gguf(
    path: Path,
    arch: str,
    tensors: Sequence[GGUFTensor],
    add_metadata: Callable[[gguf.GGUFWriter], None],
    *,
    force: bool = False,
    check: Callable[[Path], None] | None = None,
) -> int:
    """Write a GGUF: into a temporary file beside `path`, which takes its name only when it is complete.

    Args:
        path: the file to write.
        arch: the value of general.architecture.
        tensors: in the order of the file.
        add_metadata: called with a gguf-py writer that knows the tensors' shapes, to add all other keys.
        force: replace an existing file.
        check: called with the complete file before it takes its name; raises where the file is no good.

    Returns:
        The file's size in bytes.

    Raises:
        D2QError: as in `check_output` and `encode`, or the disk fills up. Whatever is raised, nothing is left behind.
    """
    size = data_size(tensors)
    check_output(path, force=force, size=size)
    writer = _make_writer(arch, tensors, add_metadata)
    try:
        with _partial_file(path) as partial:
            try:
                _write_header(writer, partial)
                _write_data(writer.fout[0], tensors, size)
                writer.close()
                if check is not None:
                    check(partial)
                durable.replace(partial, path)
            finally:
                # After a failure, closing may fail too, because of what is still buffered; the first reason is the one.
                with suppress(OSError):
                    writer.close()
        return path.stat().st_size
    except OSError as error:
        raise _cannot_write(path, error) from error


def _write_data(file: BinaryIO, tensors: Sequence[GGUFTensor], size: int) -> None:
    """The tensors' data, `size` bytes, behind the header. (gguf-py's way of doing it loses the reason of errors.)"""
    file.write(bytes(-file.tell() % ALIGNMENT))
    file.flush()
    start = file.tell()
    # None: no bar where stderr isn't a terminal.
    with tqdm(total=size, desc="Writing", unit="B", unit_scale=True, disable=None) as progress:
        write_pieces(file.fileno(), _pieces(tensors, start), progress.update)
    # What lies between the tensors was never written and reads as zeros, as padding must; this is the last one's.
    file.truncate(start + size)


def _pieces(tensors: Sequence[GGUFTensor], offset: int) -> Iterator[Piece]:
    """The data of tensors, of which the first begins at that place of the file."""
    for tensor in tensors:
        for part in tensor.parts or (tensor,):
            yield Piece(offset, functools.partial(_data, part), part.group)
            offset += part.nbytes
        offset += -tensor.nbytes % ALIGNMENT


def _data(tensor: GGUFTensor) -> memoryview:
    return np.ascontiguousarray(encode(tensor)).reshape(-1).view(np.uint8).data


class _Writer(gguf.GGUFWriter):  # type: ignore[misc]  # gguf-py has no types
    """gguf-py's writer packs arrays item by item: most of a second for a large vocabulary, three times in a conversion,
    for the file's size, for the check of the tokenizer and for the file. This one does it at once.
    """

    def _pack_val(
        self,
        val: Any,
        vtype: gguf.GGUFValueType,
        add_vtype: bool,
        sub_type: gguf.GGUFValueType | None = None,
    ) -> bytes:
        """The same bytes."""
        array = vtype == gguf.GGUFValueType.ARRAY and isinstance(val, list) and sub_type is None
        kinds = set(map(type, val)) if array else set()
        if kinds == {str}:
            encoded = [text.encode() for text in val]
            items = b"".join(part for text in encoded for part in (struct.pack("<Q", len(text)), text))
        elif len(kinds) == 1 and (item := _ITEMS.get(*kinds)):
            items = struct.pack(f"<{len(val)}{item}", *val)
        else:
            return bytes(super()._pack_val(val, vtype, add_vtype, sub_type))
        head = struct.pack("<I", vtype) if add_vtype else b""
        return head + struct.pack("<IQ", gguf.GGUFValueType.get_type(val[0]), len(val)) + items


def _make_writer(
    arch: str, tensors: Sequence[GGUFTensor], add_metadata: Callable[[gguf.GGUFWriter], None]
) -> gguf.GGUFWriter:
    writer = _Writer(path=None, arch=arch)
    for tensor in tensors:
        # A float dtype keeps gguf-py from working the shape out of a type that it may not know.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, _type_id(tensor.type))
    with _strange_values():
        add_metadata(writer)
    return writer


def _write_header(writer: gguf.GGUFWriter, path: Path) -> None:
    """Everything before the tensors' data."""
    with _strange_values():
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()


@contextmanager
def _strange_values() -> Iterator[None]:
    """Say in one sentence what gguf-py makes of values that a stranger's model card or tokenizer brought along.

    It checks some when they are added, and others when they are written.
    """
    try:
        yield
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, OverflowError, struct.error) as error:
        raise D2QError(
            f"the model's metadata can't be written ({type(error).__name__}: {error}); a value in README.md, "
            "generation_config.json or the tokenizer's files is of the wrong kind"
        ) from error


def _type_id(type_name: str) -> int:
    own = tensor_types.BY_NAME.get(type_name)
    return own.id if own is not None else int(STOCK_TYPES[type_name])


@contextmanager
def _partial_file(path: Path) -> Iterator[Path]:
    """An empty temporary file beside `path`, locked against other processes; removed if it is still there at the end.

    One that a killed process left is taken over.
    """
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


def _cannot_write(path: Path, error: OSError) -> D2QError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return D2QError(f"the disk is full: {path} could not be written; free some space and run the same command")
    return D2QError(f"can't write {path}: {error.strerror or error}")
