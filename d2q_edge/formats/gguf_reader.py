"""Read GGUF files (ggml/docs/gguf.md) with tensors of stock types, ours and unknown ones.

Unlike gguf-py's reader, this one takes unknown type numbers and trusts no file: what is malformed is a D2QError.
"""

from __future__ import annotations

import functools
import math
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from d2q_edge.errors import D2QError
from d2q_edge.formats import tensor_types

VERSIONS, MAX_DIMS = (2, 3), 4
MAX_ITEMS = 1 << 22
"""More items than any key's array has; as Python objects they take thirty times the file's memory."""
SCALAR_FORMATS = dict(enumerate("BbHhIif?")) | dict(enumerate("Qqd", 10))
"""GGUF's scalar value types: number to struct format."""
_STRING, _ARRAY = 8, 9
TYPES: dict[int, tuple[str, int, int]] = {
    **{int(stock): (stock.name.lower(), *sizes) for stock, sizes in gguf.GGML_QUANT_SIZES.items()},
    **{own.id: (own.name, own.block_size, own.type_size) for own in tensor_types.ALL},
}
"""Number of a tensor type to its name, weights per block and bytes per block."""


@functools.cache
def can_decode(type_id: int) -> bool:
    """Return whether `GGUFFile.dequantize` knows a type, which takes more than its block size."""
    if type_id in tensor_types.BY_ID:
        return True
    try:
        block = np.zeros((1, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(type_id)][1]), np.uint8)
        gguf.quants.dequantize(block, gguf.GGMLQuantizationType(type_id))
    except (ValueError, KeyError, NotImplementedError):
        return False
    return True


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file. `shape` is in numpy's order; `offset` counts bytes from the start of the file.

    `type_name` is lower case ("q8_0"), or "type" and the number for an unknown type, whose `nbytes` reach to the next
    tensor or the end of the file.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    type_name: str
    offset: int
    nbytes: int

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


class GGUFFile:
    """A GGUF whose header has been parsed; tensor data stays on disk until it is asked for.

    `kv` has the metadata by key, arrays as lists; `tensors` is in the order of the file; `size` is the file's in bytes.
    `raw_values` are the bytes of every key's value with its type in front, `raw_infos` those that describe the tensors,
    and `data_start` the end of the header, which is padded to `alignment`.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a file and check its header.

        Raises:
            D2QError: it can't be read, isn't a GGUF, is truncated, or contradicts itself.
        """
        self.path = Path(path)
        try:
            if not self.path.is_file():
                raise D2QError(f"there is no file {self.path}")
            self.size = self.path.stat().st_size
            if self.size < 24:
                raise D2QError(f"{self.path} is too short to be a GGUF file")
            self._data: npt.NDArray[np.uint8] = np.memmap(self.path, dtype=np.uint8, mode="r")
        except OSError as error:
            raise D2QError(f"can't read {self.path}: {error.strerror or error}") from error
        self._bytes, self._position = self._data.data, 0  # a memoryview: small reads are several times as fast
        self.kv: dict[str, Any] = {}
        self.raw_values: dict[str, memoryview] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._parse()

    @property
    def packed(self) -> dict[str, tuple[int, memoryview]]:
        """The number of every value's type, and its bytes without that number, by key."""
        return {key: (int.from_bytes(raw[:4], "little"), raw[4:]) for key, raw in self.raw_values.items()}

    @property
    def bits_per_weight(self) -> float:
        """Mean over the elements of all tensors; 0 for a file without any."""
        elements = sum(info.elements for info in self.tensors.values())
        return 8 * sum(info.nbytes for info in self.tensors.values()) / elements if elements else 0.0

    @property
    def context_length(self) -> int | None:
        """The model's training context in tokens, where the file has it."""
        length = self.kv.get(f"{self.kv.get('general.architecture')}.context_length")
        return length if type(length) is int and length > 0 else None

    def check_blocks(self, chunk: int = 1 << 20) -> None:
        """Check that blocks of our types have finite scales, and norms finite weights; llama.cpp computes on with NaN.

        All other bytes of a block are valid whatever they are. This reads the data once, `chunk` blocks at a time.

        Raises:
            D2QError: a block's scale or a norm's weight is NaN or infinite.
        """
        for info in self.tensors.values():
            is_norm = info.type_name == "f32" and len(info.shape) == 1
            if is_norm and not np.isfinite(self.raw(info.name).view("<f4")).all():
                raise D2QError(f"{self.path} is damaged: NaN or infinity in {info.name}; convert or download it again")
            own = tensor_types.BY_ID.get(info.type_id)
            if own is None:
                continue
            blocks = self.raw(info.name).reshape(-1, own.type_size)
            for start in range(0, len(blocks), chunk):
                scales = np.ascontiguousarray(blocks[start : start + chunk, :2]).view("<u2")
                bad = (scales & 0x7C00) == 0x7C00  # the exponent is all ones in NaN and infinity
                if bad.any():
                    raise D2QError(
                        f"{self.path} is damaged: the scale of block {start + int(bad.argmax())} of tensor {info.name} "
                        "is NaN or infinite; convert or download it again"
                    )

    def raw(self, name: str, part: int | None = None) -> npt.NDArray[np.uint8]:
        """Return the bytes of a tensor, or of one `part` of it along the first axis, uint8 [n], mapped from the file.

        Raises:
            D2QError: there is no such tensor.
        """
        if name not in self.tensors:
            raise D2QError(f"{self.path} has no tensor {name}")
        info = self.tensors[name]
        data = self._data[info.offset : info.offset + info.nbytes]
        return data if part is None else data.reshape(info.shape[0], -1)[part]

    def dequantize(self, name: str, part: int | None = None) -> npt.NDArray[np.float32]:
        """Return the values of what `raw` returns, float32; ours exactly as `tensor_types.dequantize` defines them.

        Raises:
            D2QError: there is no such tensor, or its type can't be decoded.
        """
        raw, info = self.raw(name, part), self.tensors[name]
        shape = info.shape if part is None else info.shape[1:]
        own = tensor_types.BY_ID.get(info.type_id)
        if own is not None:
            return tensor_types.dequantize(own, raw.reshape(-1, own.row_bytes(info.shape[-1]))).reshape(shape)
        if not can_decode(info.type_id):
            raise D2QError(f"tensor {name} of {self.path} has the type {info.type_name}, which can't be decoded")
        # As rows: gguf-py takes a few at a time, so that its intermediate results stay small.
        rows = raw.reshape(math.prod(shape[:-1]), -1)
        with np.errstate(all="ignore"):  # a damaged scale gives NaN, which is the caller's to judge
            values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(info.type_id))
        return np.asarray(values, dtype=np.float32).reshape(shape)

    def _parse(self) -> None:
        magic, version = self._take("4sI")
        if magic != b"GGUF":
            raise D2QError(f"{self.path} isn't a GGUF file")
        if version not in VERSIONS:
            swapped = int.from_bytes(int(version).to_bytes(4, "little"), "big") in VERSIONS
            raise D2QError(
                f"{self.path} is a {'big-endian GGUF' if swapped else f'GGUF of version {version}'}; "
                f"only little-endian files of the versions {VERSIONS[0]} and {VERSIONS[1]} can be read"
            )
        tensor_count, key_count = self._take("QQ")
        for _ in range(key_count):
            key = self._name()
            if key in self.kv:
                raise self._malformed(f"the key {key} comes twice")
            start = self._position
            self.kv[key] = self._value(*self._take("I"))
            self.raw_values[key] = self._bytes[start : self._position]
        alignment = self.kv.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise self._malformed("general.alignment isn't a power of two")
        found: dict[str, tuple[tuple[int, ...], int, int]] = {}
        start = self._position
        for _ in range(tensor_count):
            name = self._name()
            if name in found:
                raise self._malformed(f"the tensor {name} comes twice")
            (dims,) = self._take("I")
            if dims > MAX_DIMS:
                raise self._malformed(f"the tensor {name} has {dims} dimensions")
            shape = self._take(f"{dims}Q")[::-1]
            if 0 in shape:
                raise self._malformed(f"the tensor {name} is empty")
            type_id, offset = self._take("IQ")
            found[name] = shape, type_id, offset
        self.raw_infos = self._bytes[start : self._position]
        self.alignment: int = alignment
        self.data_start = -(-self._position // alignment) * alignment
        self._place(found, self.data_start)

    def _place(self, found: dict[str, tuple[tuple[int, ...], int, int]], start: int) -> None:
        """Fill `tensors` from (shape, type, offset from `start`) by name, and check sizes against the file."""
        following = dict(pairwise(sorted({offset for _, _, offset in found.values()} | {self.size - start})))
        for name, (shape, type_id, offset) in found.items():
            if offset % self.alignment:
                raise self._malformed(f"the tensor {name} isn't aligned")
            if type_id in TYPES:
                type_name, block, size = TYPES[type_id]
                width = shape[-1] if shape else 1
                if width % block:
                    raise self._malformed(f"{block} doesn't divide the width {width} of the {type_name} tensor {name}")
                nbytes = math.prod(shape) // block * size
            else:
                type_name, nbytes = f"type{type_id}", max(following.get(offset, offset) - offset, 0)
            if start + offset + nbytes > self.size:
                raise D2QError(f"{self.path} is truncated: it ends after {self.size} bytes, before tensor {name} does")
            self.tensors[name] = TensorInfo(name, shape, type_id, type_name, start + offset, nbytes)
        extents = sorted((info.offset, info.offset + info.nbytes, info.name) for info in self.tensors.values())
        for (_, end, name), (begin, _, other) in pairwise(extents):
            if begin < end:
                raise self._malformed(f"the tensors {name} and {other} overlap")

    def _value(self, value_type: int) -> Any:
        if value_type in SCALAR_FORMATS:
            return self._take(SCALAR_FORMATS[value_type])[0]
        if value_type == _STRING:
            return self._string()
        if value_type != _ARRAY:
            raise self._malformed(f"there is no value type {value_type}")
        item_type, count = self._take("IQ")
        if count > MAX_ITEMS:
            raise self._malformed(f"an array has {count} items")
        if item_type in SCALAR_FORMATS:
            return list(self._take(f"{count}{SCALAR_FORMATS[item_type]}"))
        if item_type != _STRING:
            raise self._malformed(f"an array holds items of type {item_type}")
        return [self._string() for _ in range(count)]

    def _name(self) -> str:
        """Read the name of a key or tensor, which must be safe to show in messages."""
        name = self._string()
        if not name.isprintable() or "\ufffd" in name:
            raise self._malformed(f"a key or tensor has the name {name[:100]!r}")
        return name

    def _string(self) -> str:
        return str(self._read(*self._take("Q")), "utf-8", "replace")

    def _take(self, layout: str) -> tuple[Any, ...]:
        """Read the next values, little-endian and unpadded."""
        try:
            size = struct.calcsize("<" + layout)
        except (struct.error, OverflowError):
            raise self._malformed("a count is impossibly large") from None
        return struct.unpack("<" + layout, self._read(size))

    def _read(self, count: int) -> memoryview:
        if count > self.size - self._position:
            raise D2QError(f"{self.path} is truncated or malformed: its header reaches beyond the end of the file")
        self._position += count
        return self._bytes[self._position - count : self._position]

    def _malformed(self, what: str) -> D2QError:
        return D2QError(f"{self.path} is malformed: {what}")
