"""Small GGUF files, written with gguf-py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from d2q_edge.formats.gguf_reader import GGUFFile

Data = npt.NDArray[Any] | tuple[int, npt.NDArray[np.uint8]]


def finish(writer: gguf.GGUFWriter) -> None:
    """Write all that a writer has been given, and close its file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def changed(
    source: Path, target: Path, keys: Mapping[str, Any] | None = None, tensors: Mapping[str, Data | None] | None = None
) -> Path:
    """Copy a GGUF file with some keys and tensors added, replaced or (None) left out; return the copy's path.

    A tensor is an array of floats, or the number of a type and bytes, uint8 [rows, bytes].
    """
    file, keys, tensors = GGUFFile(source), keys or {}, tensors or {}
    arch = keys.get("general.architecture", file.kv["general.architecture"])
    writer = gguf.GGUFWriter(target, arch)
    for key, value in ({**file.kv, **keys}).items():
        if key == "general.architecture" or value is None:
            continue
        kind = gguf.GGUFValueType.get_type(value)
        if key not in keys:
            kind = gguf.GGUFValueType(file.packed[key][0])
        elif kind == gguf.GGUFValueType.INT32:  # as llama.cpp's numbers are
            kind = gguf.GGUFValueType.UINT32
        writer.add_key_value(key, value, kind)
    for name in file.tensors.keys() | tensors.keys():
        data = tensors[name] if name in tensors else (file.tensors[name].type_id, _rows(file, name))
        if isinstance(data, tuple):
            writer.add_tensor(name, data[1], raw_dtype=gguf.GGMLQuantizationType(data[0]))
        elif data is not None:
            writer.add_tensor(name, data)
    finish(writer)
    return target


def _rows(file: GGUFFile, name: str) -> npt.NDArray[np.uint8]:
    """A tensor's bytes in the shape that gguf-py wants."""
    return np.array(file.raw(name)).reshape(*file.tensors[name].shape[:-1], -1)
