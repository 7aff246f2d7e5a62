"""What a conversion measured, as JSON: written by `convert --report`, found again by `compare`.

The content is what `convert.Conversion.to_json` makes. Knows where the file lies; not how its numbers came about.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d2q_edge.errors import D2QError
from d2q_edge.gguf_reader import GGUFFile


def beside(path: Path) -> Path:
    """Where the report of a GGUF file is looked for."""
    return path.with_name(path.name + ".json")


def find_report(path: Path, file: GGUFFile, named: Sequence[Path] = ()) -> Mapping[str, Any] | None:
    """The report of a GGUF file: the one among `named` that is about it, or the one beside it, or None.

    A report is about a file if it tells that file's size in bytes, so that files may be renamed, and a report of an
    earlier version of the file is not taken for this one's.

    Raises:
        D2QError: a named report can't be read.
    """
    for candidate in named:
        report = read_report(candidate)
        if report["bytes"] == file.size:
            return report
    if beside(path).is_file():
        try:
            report = read_report(beside(path))
        except D2QError:
            return None
        return report if report["bytes"] == file.size else None
    return None


def read_report(path: Path) -> dict[str, Any]:
    """Read a report.

    Raises:
        D2QError: it can't be read, or isn't one.
    """
    try:
        report = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise D2QError(f"can't read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise D2QError(f"{path} isn't a report of convert: {error}") from error
    if not isinstance(report, dict) or not isinstance(report.get("bytes"), int):
        raise D2QError(f"{path} isn't a report of convert: it has no size in bytes")
    return report
