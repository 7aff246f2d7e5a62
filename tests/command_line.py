"""What a command of the console script did, and what a refusal looks like. The fixture `d2q` runs one."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


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
