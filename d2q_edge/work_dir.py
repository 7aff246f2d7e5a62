"""The directory beside the output that makes an interrupted conversion resumable.

Knows how finished blocks are kept: one safetensors file per block, and another one once it is refined, each written
under another name and then renamed, so that a file that is there is complete. Does not know what the bytes mean. A
fingerprint of inputs and options guards against mixing the blocks of two different conversions.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from d2q_edge.errors import D2QError

Packed = npt.NDArray[np.uint8]
Tensor = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
"""Packed weights, or floats."""
OWN_FILE = re.compile(r"settings\.(json|partial)|(block|refined)-\d+\.(safetensors|partial)")
"""Names that may be in a work directory; one that holds anything else is never deleted."""


class WorkDir:
    """OUT.gguf.work, beside OUT.gguf. Exists from the first finished block until the file is complete."""

    def __init__(self, output: Path, fingerprint: Mapping[str, Any], *, force: bool = False) -> None:
        """Open the work directory of `output`, if there is one.

        Args:
            output: the file that the conversion will write.
            fingerprint: JSON values that decide the blocks' content: inputs and options.
            force: start anew where the directory holds blocks of another conversion.

        Raises:
            D2QError: it holds blocks of another conversion (and not `force`), or somebody else's files.
        """
        self.path = output.with_name(output.name + ".work")
        self._settings = self.path / "settings.json"
        # As it will be read back: tuples become lists.
        self._fingerprint: dict[str, Any] = json.loads(json.dumps(fingerprint))
        try:
            if self.path.exists():
                self._take_over(force)
        except (OSError, ValueError) as error:
            raise D2QError(f"can't use the work directory {self.path} ({error}); remove it") from error

    def has_block(self, index: int, *, refined: bool = False) -> bool:
        """Whether block `index` is finished, or its refined version."""
        return self._file(index, refined).is_file()

    @property
    def finished(self) -> int:
        """Number of finished blocks."""
        return len(list(self.path.glob("block-*.safetensors")))

    def read_block(self, index: int, *, refined: bool = False) -> dict[str, Tensor]:
        """The tensors of a finished block, or of its refined version, by full name.

        Raises:
            D2QError: the file is damaged.
        """
        try:
            return dict(load_file(self._file(index, refined)))
        except (OSError, SafetensorError) as error:
            raise D2QError(f"{self._file(index, refined)} is damaged ({error}); remove it and convert again") from error

    def write_block(self, index: int, tensors: Mapping[str, Tensor], *, refined: bool = False) -> None:
        """Keep the tensors of a block, or their refined version.

        Raises:
            D2QError: the disk is full or not writable.
        """
        file = self._file(index, refined)
        partial = file.with_suffix(".partial")
        try:
            self._create()
            save_file({name: np.ascontiguousarray(data) for name, data in tensors.items()}, partial)
            partial.replace(file)
        except (OSError, SafetensorError) as error:
            raise D2QError(f"can't write {file} ({error}); free some disk space and run the same command") from error

    def remove(self) -> None:
        """Delete the directory with all blocks."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _take_over(self, force: bool) -> None:
        """Keep the directory if its blocks are of this conversion; else delete it, or refuse to."""
        if foreign := [entry.name for entry in self.path.iterdir() if not OWN_FILE.fullmatch(entry.name)]:
            raise D2QError(f"{self.path} holds {foreign[0]}, which d2q-edge didn't put there; move it away")
        if self._settings.exists():
            found = json.loads(self._settings.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("settings.json doesn't hold an object")
            if found == self._fingerprint:
                return
            if not force:
                wanted = self._fingerprint
                changed = ", ".join(sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key)))
                raise D2QError(
                    f"{self.path} holds an unfinished conversion with another {changed}; repeat that one to finish "
                    "it, or use --force to start anew"
                )
        shutil.rmtree(self.path)

    def _create(self) -> None:
        if self._settings.exists():
            return
        self.path.mkdir(exist_ok=True)
        partial = self._settings.with_suffix(".partial")
        partial.write_text(json.dumps(self._fingerprint, indent=1), encoding="utf-8")
        partial.replace(self._settings)

    def _file(self, index: int, refined: bool) -> Path:
        return self.path / f"{'refined' if refined else 'block'}-{index:04d}.safetensors"
