"""Read reports of `convert --report` (`Conversion.to_json()` and a fingerprint), and find that of a GGUF file."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from d2q_edge.errors import D2QError
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.utils.json_files import parse_json

FORMAT = 2
"""Number of the report's format. Format 1 has no number, and "held_back" in place of "validation"."""
PIECE = 2**20
"""Bytes of each piece of a file that its fingerprint is made of."""
LARGEST = 1e30
"""Numbers are summed and drawn; larger ones could overflow."""


def beside(path: Path) -> Path:
    """Return where the report of a GGUF file is looked for."""
    return path.with_name(path.name + ".json")


def fingerprint(path: Path) -> str:
    """Return the SHA-256 of a file's size and its first, middle (where every conversion differs) and last MiB.

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
    """Return the report of a GGUF file: the one among `named` that is about it, or the one beside it, or None.

    A report is about a file if it has the file's size and fingerprint, so that files may be renamed and a report of an
    earlier version doesn't match. A report without a fingerprint is taken by the size alone, if no other matches.

    Raises:
        D2QError: a named report can't be read, or the file can't.
    """
    reports = [read_report(candidate) for candidate in named]
    if beside(path).is_file():
        with suppress(D2QError):
            reports.append(read_report(beside(path)))
    reports = [report for report in reports if report["bytes"] == file.size]
    ranks = (fingerprint(path), None) if reports else ()
    return next((report for rank in ranks for report in reports if report.get("fingerprint") == rank), None)


def read_report(path: Path) -> dict[str, Any]:
    """Read a report of this format or an older one, and return it in this format; only "bytes" is surely there.

    Raises:
        D2QError: it can't be read, is of a newer format, or has values that convert doesn't write.
    """
    try:
        report = parse_json(path.read_bytes())
    except OSError as error:
        raise D2QError(f"can't read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise D2QError(f"{path} isn't a report of convert: {error}") from error
    if not isinstance(report, dict) or not isinstance(report.get("bytes"), int):
        raise D2QError(f"{path} isn't a report of convert: it has no size in bytes")
    if report.get("format", FORMAT) != FORMAT:
        raise D2QError(f"{path} has a format that this version of d2q-edge doesn't know; update d2q-edge")
    if "format" not in report and "held_back" in report:
        report["validation"] = report.pop("held_back")
    for field, is_valid in FIELDS.items():
        if report.get(field) is not None and not is_valid(report[field]):
            raise D2QError(f"{path} isn't a report of convert: its {field} can't be what convert writes there")
    return report


Check = Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    """Return whether a value can be drawn, or left out of a picture as not finite."""
    return isinstance(value, int | float) and (abs(value) <= LARGEST or value != value or abs(value) == math.inf)


def _numbers(*names: str) -> Check:
    """Return a check for an object with these numbers."""
    return lambda value: isinstance(value, dict) and all(_is_number(value.get(name)) for name in names)


def _each(is_valid: Check) -> Check:
    """Return a check for an object whose values are all valid."""
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
"""Checks of what pictures and pages take from a report; each of them may be missing, or null."""
