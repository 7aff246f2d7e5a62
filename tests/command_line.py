"""Run commands: in this process with the fixture `d2q`, or as processes of their own with `run_python`."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.paths import ROOT


@dataclass(frozen=True)
class Result:
    """Exit code, and all that was written to the terminal."""

    code: int
    out: str
    err: str


Call = Callable[..., Result]


def refused(result: Result, *fragments: str) -> None:
    """Exit code 1, nothing on stdout, one sentence on stderr, nothing in the current directory."""
    assert result.code == 1, result
    assert result.out == ""
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("Error: ")
    for fragment in fragments:
        assert fragment in lines[0]
    assert list(Path.cwd().iterdir()) == []


@contextmanager
def python(*arguments: object, environment: dict[str, str] | None = None, **options: Any) -> Iterator[Any]:
    """Start Python on this checkout, one thread, stdout and stderr piped; it is killed at the end of the with block.

    Args:
        arguments: for Python.
        environment: variables to add.
        options: of subprocess.Popen.
    """
    settings = {
        "env": {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environment or {})},
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        **options,
    }
    with subprocess.Popen([sys.executable, *map(str, arguments)], **settings) as process:
        try:
            yield process
        finally:
            process.kill()


def run_python(*arguments: object, timeout: float = 120, **options: Any) -> Result:
    """Run Python to its end, see `python`."""
    with python(*arguments, **options) as process:
        out, err = process.communicate(timeout=timeout)
    return Result(process.returncode, out, err)
