"""The directory beside the output that makes an interrupted conversion resumable.

Knows how finished blocks are kept: one safetensors file per block, and another one once it is refined, each whole or
not there (durable.py), with a checksum, so that a bit that flips later is noticed too. What refinement needs to go on
is one more. The finished output lies here as well until it is complete and takes its place. Does not know what the
bytes mean. A fingerprint of inputs and options
guards against mixing the blocks of two different conversions.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from d2q_edge.errors import D2QError
from d2q_edge.utils import durable

Packed = npt.NDArray[np.uint8]
Tensor = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
"""Packed weights, or floats."""
OWN_FILE = re.compile(
    r"settings\.(json|partial)|((block|refined)-\d+|refining)\.(safetensors|partial)|complete\.gguf"
    r"|\.complete\.gguf\.partial"
)
"""Names that may be in a work directory; one that holds anything else is never deleted."""
_FINGERPRINT, _PUBLISHED = "conversion", "published"
_BESIDE = "d2q"
"""A file's metadata: its checksum and its facts, under one name, because safetensors keeps no order of names."""


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
        self.output = output
        self.path = _directory(output)
        self._settings = self.path / "settings.json"
        self._state = self.path / "refining.safetensors"
        # As it will be read back: tuples become lists.
        self._fingerprint: dict[str, Any] = json.loads(json.dumps(fingerprint))
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
        return self._read(self._file(index, refined))[0]

    def read_facts(self, index: int) -> dict[str, Any]:
        """What was kept beside the tensors of a finished block.

        Raises:
            D2QError: the file is damaged.
        """
        return self._read(self._file(index, False))[1]

    def write_block(
        self,
        index: int,
        tensors: Mapping[str, Tensor],
        *,
        refined: bool = False,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep the tensors of a block, or their refined version, and facts about it, which are JSON values.

        Raises:
            D2QError: the disk is full or not writable.
        """
        self._write(self._file(index, refined), tensors, facts or {})

    def write_state(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Keep what refinement needs to go on from here, in place of what was kept before.

        Raises:
            D2QError: the disk is full or not writable.
        """
        self._write(self._state, tensors, facts)

    def read_state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What `write_state` kept last.

        Raises:
            D2QError: the file is damaged.
        """
        return self._read(self._state) if self._state.is_file() else None

    def remove_state(self) -> None:
        """Forget it."""
        self._state.unlink(missing_ok=True)

    def publish(self) -> None:
        """Move the complete file to its place.

        Before that, the directory remembers which file it is: a process that is killed before `remove` is done would
        find the output there otherwise, and have to refuse it as a stranger's.

        Raises:
            D2QError: it can't be moved.
        """
        try:
            status = self.complete.stat()
            self._write_settings({_PUBLISHED: [status.st_size, status.st_mtime_ns]})
            durable.replace(self.complete, self.output)
        except OSError as error:
            raise D2QError(f"can't write {self.output}: {error.strerror or error}") from error

    def remove(self) -> None:
        """Delete the directory with all blocks; the settings last, so that what is left after a kill is known."""
        with suppress(OSError):
            for entry in self.path.iterdir():
                if entry != self._settings:
                    entry.unlink()
        shutil.rmtree(self.path, ignore_errors=True)

    def _write(self, file: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        partial = file.with_suffix(".partial")
        arrays: dict[str, Any] = {name: np.ascontiguousarray(data) for name, data in tensors.items()}
        try:
            self._create()
            text = json.dumps(facts)
            save_file(arrays, partial, metadata={_BESIDE: json.dumps([_checksum(file, arrays, text), text])})
            durable.replace(partial, file)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise D2QError(f"can't write {file} ({error}); free some disk space and run the same command") from error

    def _read(self, file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A file's tensors and facts."""
        try:
            # Not as numpy's: safetensors would copy, and let no other thread of Python run meanwhile. torch's lie in
            # the file, and numpy's copies keep nobody from running.
            with safe_open(file, framework="pt") as stored:
                tensors: dict[str, Any] = {
                    name: stored.get_tensor(name).numpy().copy()
                    for name in stored.keys()  # noqa: SIM118
                }
                expected, facts = json.loads((stored.metadata() or {}).get(_BESIDE, '["", ""]'))
            if _checksum(file, tensors, facts) != expected:
                raise ValueError("its checksum is wrong")
            return tensors, json.loads(facts)
        except (OSError, TypeError, ValueError, SafetensorError) as error:
            raise D2QError(f"{file} is damaged ({error}); remove it and convert again") from error

    def _take_over(self, force: bool) -> None:
        """Keep the directory if its blocks are of this conversion; else delete it, or refuse to."""
        if foreign := [entry.name for entry in self.path.iterdir() if not OWN_FILE.fullmatch(entry.name)]:
            raise D2QError(f"{self.path} holds {foreign[0]}, which d2q-edge didn't put there; move it away")
        if self._settings.exists():
            found = _read_settings(self._settings)[_FINGERPRINT]
            if found == self._fingerprint:
                return
            if not force:
                wanted = self._fingerprint
                changed = ", ".join(sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key)))
                raise D2QError(
                    f"{self.path} holds an unfinished conversion with another {changed}; repeat that one to finish "
                    "it, or use --force to start anew"
                )
        self.remove()

    def _create(self) -> None:
        if self._settings.exists():
            return
        durable.make_directory(self.path)
        self._write_settings({})

    def _write_settings(self, more: Mapping[str, Any]) -> None:
        partial = self._settings.with_suffix(".partial")
        partial.write_text(json.dumps({_FINGERPRINT: self._fingerprint, **more}, indent=1), encoding="utf-8")
        durable.replace(partial, self._settings)

    def _file(self, index: int, refined: bool) -> Path:
        return self.path / f"{'refined' if refined else 'block'}-{index:04d}.safetensors"


class BlockWriter:
    """Writes a finished block while the next one is being quantized; at the end of a with block all are written."""

    def __init__(self, work: WorkDir, *, active: bool) -> None:
        """Begin; only where `active` is anything written."""
        self.work, self.active = work, active
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def write(self, index: int, result: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write a block, once the one before is written.

        Raises:
            D2QError: that one could not be.
        """
        self._wait()
        if self.active:
            self._pending = self._thread.submit(self.work.write_block, index, result, facts=facts)

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def __enter__(self) -> "BlockWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if kind is None:
            self._wait()


def was_published(output: Path) -> bool:
    """Whether `output` is there, made by a conversion that was killed before it could remove its work directory."""
    try:
        status = output.stat()
        published = _read_settings(_directory(output) / "settings.json").get(_PUBLISHED)
    except (OSError, ValueError):
        return False
    return bool(published == [status.st_size, status.st_mtime_ns])


def _directory(output: Path) -> Path:
    return output.with_name(output.name + ".work")


def _read_settings(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not isinstance(found.get(_FINGERPRINT), dict):
        raise ValueError(f"{path.name} doesn't hold the settings of a conversion")
    return found


def _checksum(file: Path, tensors: Mapping[str, Tensor], facts: str) -> str:
    """SHA-256 over everything in a block file; its name too, because a block isn't another one."""
    digest = hashlib.sha256(json.dumps([file.name, facts]).encode())
    for name in sorted(tensors):
        data = tensors[name]
        digest.update(json.dumps([name, data.dtype.str, data.shape]).encode())
        digest.update(data.data)
    return digest.hexdigest()
