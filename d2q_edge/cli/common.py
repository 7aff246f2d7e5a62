"""What several commands need before the library is loaded."""

import json
import os
from pathlib import Path
from typing import Any

import click

from d2q_edge.errors import D2QError

PATH = click.Path(path_type=Path)
"""Type of an argument that names a file; the library says what is wrong with it."""


def wait_passively() -> None:
    """Let OpenMP's threads sleep while they wait; call it before torch or llama.cpp is loaded.

    They spin otherwise, and when anything else uses the CPU, many small operations become 40 times slower (measured).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def is_first_process() -> bool:
    """Whether this one speaks, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def write_json(path: Path, value: Any) -> None:
    """Write plain values to a file, for people and programs.

    Raises:
        D2QError: it can't be written.
    """
    try:
        path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise D2QError(f"can't write {path}: {error.strerror or error}") from error
