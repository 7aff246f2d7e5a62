"""Keep intermediate results in safetensors files that are whole or absent, with a checksum over everything in them."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from d2q_edge.errors import D2QError
from d2q_edge.utils import files

Array = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
_ENTRY = "d2q"
"""The only entry of the safetensors metadata, a JSON list of checksum and metadata: entries have no order."""


def save_tensors(path: Path, arrays: Mapping[str, Array], metadata: Mapping[str, Any]) -> None:
    """Write arrays and JSON metadata to a temporary file, flush it to disk and rename it to `path`.

    Raises:
        D2QError: the disk is full or not writable.
    """
    partial = path.with_suffix(".partial")
    contiguous: dict[str, Any] = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    text = json.dumps(metadata)
    try:
        save_file(contiguous, partial, metadata={_ENTRY: json.dumps([_checksum(path, contiguous, text), text])})
        files.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise D2QError(f"can't write {path} ({error}); free some disk space and run the same command") from error


def load_tensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what `save_tensors` wrote: arrays by name, and the metadata.

    Raises:
        D2QError: the file can't be read, or its content doesn't match its checksum.
    """
    try:
        # Through torch: safetensors' numpy reader copies while it holds Python's lock.
        with safe_open(path, framework="pt") as stored:
            names = stored.keys()
            arrays = {name: stored.get_tensor(name).numpy().copy() for name in names}
            expected, text = json.loads((stored.metadata() or {}).get(_ENTRY, '["", ""]'))
        if _checksum(path, arrays, text) != expected:
            raise ValueError("its checksum is wrong")
        return arrays, json.loads(text)
    except (OSError, TypeError, ValueError, SafetensorError) as error:
        raise D2QError(f"{path} is damaged ({error}); remove it and convert again") from error


def _checksum(path: Path, arrays: Mapping[str, Array], metadata: str) -> str:
    """Return the SHA-256 of all content, and of the file's name, so that files can't be swapped."""
    digest = hashlib.sha256(json.dumps([path.name, metadata]).encode())
    for name, array in sorted(arrays.items()):
        digest.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        digest.update(array.data)
    return digest.hexdigest()
