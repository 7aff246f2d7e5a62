"""Make an interrupted conversion resumable with a directory beside the output.

Each finished block is one file (formats/quantized_block.py), and one more once it is refined; so is the state of a
refinement. The finished output is written here too, and moved to its place when it is complete. A fingerprint of inputs
and options guards against mixing the blocks of two conversions.
"""

import json
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from d2q_edge.errors import D2QError
from d2q_edge.formats.quantized_block import QuantizedBlock
from d2q_edge.formats.tensor_file import Array, load_tensors, save_tensors
from d2q_edge.utils import files
from d2q_edge.utils.background import Background
from d2q_edge.utils.json_files import parse_json

OWN_FILE = re.compile(
    r"settings\.(json|partial)|((block|refined)-\d+|(gradients|outputs)-\d+-\d+|refining)\.(safetensors|partial)|complete\.gguf"
    r"|\.complete\.gguf\.partial"
)
"""Names that may be in a work directory; one that holds anything else is never deleted."""
LAYOUT = 3
"""Of the files in it; part of the fingerprint, so that files of another version are not read."""
_FINGERPRINT, _PUBLISHED = "conversion", "published"


class WorkDir:
    """OUT.gguf.work, beside OUT.gguf. Exists from the first finished block until the output is complete."""

    def __init__(self, output: Path, fingerprint: Mapping[str, Any], *, force: bool = False) -> None:
        """Open the work directory of `output`, if there is one.

        Args:
            output: the file that the conversion will write.
            fingerprint: JSON values that decide the blocks' content: inputs and options.
            force: start anew where the directory holds blocks of another conversion.

        Raises:
            D2QError: it holds blocks of another conversion (and not `force`), or files that aren't ours.
        """
        self.output = output
        self.path = _directory(output)
        self._settings = self.path / "settings.json"
        self._state = self.path / "refining.safetensors"
        # As it will be read back: tuples become lists.
        self._fingerprint: dict[str, Any] = json.loads(json.dumps({**fingerprint, "layout": LAYOUT}))
        try:
            if self.path.exists():
                self._take_over(force)
        except (OSError, ValueError) as error:
            raise D2QError(f"can't use the work directory {self.path} ({error}); remove it") from error

    @property
    def complete(self) -> Path:
        """Where the finished file is written; `publish` moves it to its place."""
        return self.path / "complete.gguf"

    def has_block(self, index: int, *, refined: bool = False) -> bool:
        """Tell whether block `index`, or its refined version, is finished."""
        return self._file(index, refined).is_file()

    @property
    def finished(self) -> int:
        """Number of finished blocks."""
        return len(list(self.path.glob("block-*.safetensors")))

    def read_block(self, index: int, *, refined: bool = False) -> QuantizedBlock:
        """Read a finished block, or its refined version; raise D2QError if the file is damaged."""
        return QuantizedBlock.load(self._file(index, refined))

    def write_block(self, index: int, block: QuantizedBlock, *, refined: bool = False) -> None:
        """Keep a block, or its refined version; raise D2QError if the disk is full or not writable."""
        self.create()
        block.save(self._file(index, refined))

    def write_state(self, arrays: Mapping[str, Array], metadata: Mapping[str, Any]) -> None:
        """Keep the state of the refinement, in place of an earlier one; raises D2QError like `write_block`."""
        self.create()
        save_tensors(self._state, arrays, metadata)

    def read_state(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Read the state of the refinement, if there is one: arrays and metadata; raises D2QError like `read_block`."""
        return load_tensors(self._state) if self._state.is_file() else None

    def remove_state(self) -> None:
        """Delete the state of the refinement."""
        self._state.unlink(missing_ok=True)

    def write_gradients(self, rank: int, number: int, batches: list[int], squares: Mapping[str, Array]) -> None:
        """Keep what a process measured in a pass over some batches; raises D2QError like `write_block`."""
        save_tensors(self._gradients(rank, number), squares, {"batches": batches})

    def read_gradients(self, rank: int, number: int, batches: list[int]) -> dict[str, Any] | None:
        """Read what `write_gradients` kept of these batches, if it did; raises D2QError like `read_block`."""
        path = self._gradients(rank, number)
        arrays, metadata = load_tensors(path) if path.is_file() else ({}, {})
        # With other memory, a pass has other batches.
        return arrays if metadata.get("batches") == batches else None

    def write_outputs(self, rank: int, index: int, batches: list[int], moments: Mapping[str, Array]) -> None:
        """Keep the output Hessians of block `index` over a process's batches so far; raises like `write_block`."""
        save_tensors(self._outputs(rank, index), moments, {"batches": batches})

    def read_outputs(self, rank: int, index: int) -> tuple[dict[str, Any], list[int]]:
        """Read what `write_outputs` kept, and the batches: nothing, of none, if there is nothing yet."""
        path = self._outputs(rank, index)
        arrays, metadata = load_tensors(path) if path.is_file() else ({}, {"batches": []})
        return arrays, metadata["batches"]

    def publish(self) -> None:
        """Move the complete file to its place.

        Before that, the directory records which file it is, so that a conversion that is killed before `remove` is done
        recognizes its own output.

        Raises:
            D2QError: it can't be moved.
        """
        try:
            status = self.complete.stat()
            self._write_settings({_PUBLISHED: [status.st_size, status.st_mtime_ns]})
            files.replace(self.complete, self.output)
        except OSError as error:
            raise D2QError(f"can't write {self.output}: {error.strerror or error}") from error

    def remove(self) -> None:
        """Delete the directory; the settings last, so that what a kill leaves behind is recognized."""
        with suppress(OSError):
            for entry in self.path.iterdir():
                if entry != self._settings:
                    entry.unlink()
        shutil.rmtree(self.path, ignore_errors=True)

    def _take_over(self, force: bool) -> None:
        """Keep the directory if its blocks are of this conversion; otherwise delete it, or refuse to."""
        if foreign := [entry.name for entry in self.path.iterdir() if not OWN_FILE.fullmatch(entry.name)]:
            raise D2QError(f"{self.path} holds {foreign[0]}, which d2q-edge didn't put there; move it away")
        if self._settings.exists():
            found = _read_settings(self._settings)[_FINGERPRINT]
            if found == self._fingerprint:
                return
            if not force and self.finished:
                wanted = self._fingerprint
                changed = ", ".join(sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key)))
                raise D2QError(
                    f"{self.path} holds an unfinished conversion with another {changed}; repeat that one to finish "
                    "it, or use --force to start anew"
                )
        self.remove()

    def create(self) -> None:
        """Make the directory, if it isn't there; raise D2QError if it can't be written to."""
        if self._settings.exists():
            return
        try:
            files.make_directory(self.path)
            self._write_settings({})
        except OSError as error:
            raise D2QError(
                f"can't write to {self.path} ({error}); free some disk space and run the same command"
            ) from error

    def _write_settings(self, more: Mapping[str, Any]) -> None:
        partial = self._settings.with_suffix(".partial")
        partial.write_text(json.dumps({_FINGERPRINT: self._fingerprint, **more}, indent=1), encoding="utf-8")
        files.replace(partial, self._settings)

    def _gradients(self, rank: int, number: int) -> Path:
        return self.path / f"gradients-{rank}-{number}.safetensors"

    def _outputs(self, rank: int, index: int) -> Path:
        return self.path / f"outputs-{rank}-{index:04d}.safetensors"

    def _file(self, index: int, refined: bool) -> Path:
        return self.path / f"{'refined' if refined else 'block'}-{index:04d}.safetensors"


class BlockWriter(Background):
    """Write a finished block while the next one is quantized; at the end of a with block all are written."""

    def __init__(self, work: WorkDir, *, active: bool) -> None:
        """Start; nothing is written unless `active`."""
        super().__init__()
        self.work, self.active = work, active

    def write(self, index: int, block: QuantizedBlock) -> None:
        """Write a block, once the one before is written; raise D2QError if that one could not be."""
        if self.active:
            self.start(self.work.write_block, index, block)


def was_published(output: Path) -> bool:
    """Tell whether `output` was completed by a conversion that was killed before it could remove its work directory."""
    try:
        status = output.stat()
        published = _read_settings(_directory(output) / "settings.json").get(_PUBLISHED)
    except (OSError, ValueError):
        return False
    return bool(published == [status.st_size, status.st_mtime_ns])


def _directory(output: Path) -> Path:
    return output.with_name(output.name + ".work")


def _read_settings(path: Path) -> dict[str, Any]:
    found = parse_json(path.read_bytes())
    if not isinstance(found, dict) or not isinstance(found.get(_FINGERPRINT), dict):
        raise ValueError(f"{path.name} doesn't hold the settings of a conversion")
    return found
