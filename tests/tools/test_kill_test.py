"""A few kills of a small conversion, and that the tool would notice what it looks for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from d2q_edge.errors import D2QError
from d2q_edge.options import Options
from tests.checkpoints import write_checkpoint
from tools import kill_test

QUICK = Options(calibration_tokens=128, context=32)


def test_three_kills(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", "llama", intermediate_size=64)
    killed = kill_test.run(tmp_path / "model", QUICK, kills=3, seed=1)
    assert sum(killed.values()) == 3


def test_a_file_that_differs_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def random_file(model: Path, output: Path, options: Options) -> None:
        Path.mkdir(output.parent / "x")
        Path.replace(output.parent / "x", output.parent / "y")
        (output.parent / "y").rmdir()
        output.write_bytes(os.urandom(8))

    monkeypatch.setattr(kill_test, "convert", random_file)
    with pytest.raises(D2QError, match="the file differs"):
        kill_test.run(tmp_path, QUICK, kills=5, seed=0)


def test_a_command_that_does_not_go_on_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def once(model: Path, output: Path, options: Options, **_: Any) -> None:
        if (output.parent / "x").exists():
            raise D2QError("remove x")
        Path.mkdir(output.parent / "x")
        Path.unlink(output, missing_ok=True)
        output.write_bytes(b"same")
        Path.replace(output.parent / "x", output.parent / "y")
        (output.parent / "y").rmdir()

    monkeypatch.setattr(kill_test, "convert", once)
    with pytest.raises(D2QError, match=r"ended with status 1|a finished conversion leaves y"):
        kill_test.run(tmp_path, QUICK, kills=20, seed=0)
