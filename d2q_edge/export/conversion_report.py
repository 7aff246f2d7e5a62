"""What a conversion measured, as JSON: written by `convert --report`, found again by `compare`.

The content is what `convert.Conversion.to_json` makes, and the file's fingerprint. Knows where the file lies, and which
of its values pictures and pages rely on; not how its numbers came about.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from d2q_edge.errors import D2QError
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.utils.json_files import parse_json

PIECE = 2**20
"""Bytes of each piece of a file that its fingerprint is made of."""
LARGEST = 1e30
"""No number in a report is larger; they are added up and drawn, and what is near the largest float overflows."""


def beside(path: Path) -> Path:
    """Where the report of a GGUF file is looked for."""
    return path.with_name(path.name + ".json")


def fingerprint(path: Path) -> str:
    """Tells a file from others of the same size, without reading gigabytes: SHA-256 of its size and three pieces.

    The pieces are its first, middle and last MiB. Files of two conversions differ in the weights of every block, and so
    in the middle at the latest.

    Raises:
        D2QError: the file can't be read.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            found = hashlib.sha256(f"{size}\n".encode())
            for start in (0, (size - PIECE) // 2, size - PIECE):
                file.seek(max(0, start))
                found.update(file.read(PIECE))
    except OSError as error:
        raise D2QError(f"can't read {path}: {error.strerror or error}") from error
    return found.hexdigest()


def find_report(path: Path, file: GGUFFile, named: Sequence[Path] = ()) -> Mapping[str, Any] | None:
    """The report of a GGUF file: the one among `named` that is about it, or the one beside it, or None.

    A report is about a file if it has that file's size in bytes and its fingerprint, so that files may be renamed, and
    a report of an earlier version of the file is not taken for this one's. Older reports have no fingerprint; one of
    them is taken by the size alone, if no other is about the file.

    Raises:
        D2QError: a named report can't be read, or the file can't.
    """
    reports = [read_report(candidate) for candidate in named]
    if beside(path).is_file():
        with suppress(D2QError):
            reports.append(read_report(beside(path)))
    reports = [report for report in reports if report["bytes"] == file.size]
    told = [report for report in reports if report.get("fingerprint") is not None]
    if told:
        own = fingerprint(path)
        told = [report for report in told if report["fingerprint"] == own]
    older = [report for report in reports if report.get("fingerprint") is None]
    return next(iter(told + older), None)


def read_report(path: Path) -> dict[str, Any]:
    """Read a report.

    Raises:
        D2QError: it can't be read, or isn't one: what it has is not as convert writes it. It may lack anything but the
            size.
    """
    try:
        report = parse_json(path.read_bytes())
    except OSError as error:
        raise D2QError(f"can't read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise D2QError(f"{path} isn't a report of convert: {error}") from error
    if not isinstance(report, dict) or not isinstance(report.get("bytes"), int):
        raise D2QError(f"{path} isn't a report of convert: it has no size in bytes")
    for field, is_valid in FIELDS.items():
        if report.get(field) is not None and not is_valid(report[field]):
            raise D2QError(f"{path} isn't a report of convert: its {field} can't be what convert writes there")
    return report


Check = Callable[[Any], bool]
"""Whether a value from a report is what it should be."""


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    """Whether it is one that can be drawn, or left out of a picture as not finite."""
    if not isinstance(value, int | float):
        return False
    return abs(value) <= LARGEST or value != value or abs(value) == math.inf


def _numbers(*names: str) -> Check:
    """Whether a value is an object with these numbers."""
    return lambda value: isinstance(value, dict) and all(_is_number(value.get(name)) for name in names)


def _each(is_valid: Check) -> Check:
    """Whether a value is an object, and everything in it is valid."""
    return lambda value: isinstance(value, dict) and all(map(is_valid, value.values()))


FIELDS: Mapping[str, Check] = {
    "fingerprint": _is_text,
    "types": _each(_is_text),
    "layer_errors": _each(_is_number),
    "column_scales": _each(_numbers("minimum", "p05", "median", "p95", "maximum")),
    "norm_shifts": _each(_numbers("applied", "norm", "relative_norm", "signal_to_noise", "gain", "channels")),
    "validation": _numbers("tokens", "kl_divergence", "kl_divergence_stderr"),
    "seconds": _each(_is_number),
}
"""What pictures and pages take from a report; each of them may be missing, or null."""
