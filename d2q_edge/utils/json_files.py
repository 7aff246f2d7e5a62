"""Read JSON from untrusted files."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from d2q_edge.errors import D2QError


def read_json_object(path: Path, *, strict: bool = False) -> dict[str, Any]:
    """Read a JSON file whose top level is an object; `strict` as in `parse_json`.

    Raises:
        D2QError: the file can't be read, isn't JSON, or isn't an object.
    """
    try:
        value = parse_json(path.read_bytes(), strict=strict)
    except OSError as error:
        raise D2QError(f"can't read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise D2QError(f"{path} isn't valid JSON ({error}); the download may be incomplete") from error
    if not isinstance(value, dict):
        raise D2QError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def parse_json(content: bytes, *, strict: bool = False) -> Any:
    """Parse JSON in UTF-8; with `strict`, refuse a key that comes twice: parsers disagree about which one counts.

    Raises:
        ValueError: it isn't JSON, is nested too deep for the parser, or is refused.
    """
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_unique if strict else None)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r} comes twice")
    return found
