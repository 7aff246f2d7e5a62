"""What several commands need before the library is loaded."""

import json
import math
import os
from pathlib import Path
from typing import Any

import click

from d2q_edge.errors import D2QError

PATH = click.Path(path_type=Path)
"""Type of an argument that names a file; the library says what is wrong with it."""


class Number(click.FloatRange):
    """A number in a range; "nan" and "inf" are none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click does it."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a number in the range {self._describe_range()}.", param, ctx)
        return number


MAX_THREADS = 512
"""ggml's limit, beyond which it stops the whole process."""
THREADS = click.IntRange(1, MAX_THREADS)


def wait_passively() -> None:
    """Let OpenMP's threads sleep while they wait; call it before torch or llama.cpp is loaded.

    They spin otherwise, and when anything else uses the CPU, many small operations become 40 times slower (measured).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def is_first_process() -> bool:
    """Whether this one speaks, of those that share the work (ranks.py)."""
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
