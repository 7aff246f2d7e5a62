"""A few kills of a small conversion, and that the tool notices what it looks for."""

import os
from pathlib import Path

import pytest

from d2q_edge.conversion import convert
from d2q_edge.errors import D2QError
from d2q_edge.options import Options
from tests.checkpoints import write_checkpoint
from tools import kill_test

pytestmark = pytest.mark.slow


def test_three_kills(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", "llama", intermediate_size=64)
    options = Options(calibration_tokens=128, context=32)
    killed = kill_test.run(lambda output: convert(tmp_path / "model", output, options), kills=3, seed=1)
    assert sum(killed.values()) == 3


def test_a_file_that_differs_is_noticed() -> None:
    def convert(output: Path) -> None:
        Path.mkdir(output.parent / "x")
        Path.replace(output.parent / "x", output.parent / "y")
        (output.parent / "y").rmdir()
        output.write_bytes(os.urandom(8))

    with pytest.raises(D2QError, match="the file differs"):
        kill_test.run(convert, kills=5, seed=0)


def test_a_command_that_does_not_go_on_is_noticed() -> None:
    def convert(output: Path) -> None:
        if (output.parent / "x").exists():
            raise D2QError("remove x")
        Path.mkdir(output.parent / "x")
        Path.unlink(output, missing_ok=True)
        output.write_bytes(b"same")
        Path.replace(output.parent / "x", output.parent / "y")
        (output.parent / "y").rmdir()

    with pytest.raises(D2QError, match=r"ended with status 1|a finished conversion leaves y"):
        kill_test.run(convert, kills=20, seed=0)
