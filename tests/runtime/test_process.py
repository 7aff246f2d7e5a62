"""Programs that take minutes: log, progress, errors."""

import sys
from pathlib import Path

import pytest

from d2q_edge.errors import D2QError
from d2q_edge.runtime import process


def test_output_goes_to_the_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    process.run_logged([sys.executable, "-c", "print('hello')"], tmp_path / "log", "Failed")
    assert (tmp_path / "log").read_text().endswith("\nhello\n")
    assert capfd.readouterr() == ("", "")


def test_failure_is_one_sentence_after_the_last_lines(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = "for i in range(100): print('line', i)\nraise SystemExit(3)"
    with pytest.raises(D2QError) as caught:
        process.run_logged([sys.executable, "-c", code], tmp_path / "log", "Building it failed")
    assert str(caught.value) == f"Building it failed; see {tmp_path / 'log'}"
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1] == "line 99"
    assert "line 50" not in lines


def test_program_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(D2QError, match="Failed: no-such-program can't be started"):
        process.run_logged(["no-such-program"], tmp_path / "log", "Failed")


def test_output_that_is_no_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = r"import sys; sys.stdout.buffer.write(b'a\xff\n'); raise SystemExit(1)"
    with pytest.raises(D2QError):
        process.run_logged([sys.executable, "-c", code], tmp_path / "log", "Failed")
    assert (tmp_path / "log").read_bytes().endswith(b"\na\xff\n")
    assert capfd.readouterr().err == "a\ufffd\n"


def test_program_gets_time_to_clean_up(tmp_path: Path) -> None:
    """What interrupts this process interrupts the program, too; here it is the log that fails."""

    class FullDisk:
        def write(self, piece: bytes) -> None:
            raise OSError("no space")

    code = "import time; print('x', flush=True); time.sleep(0.3); open('cleaned', 'w').close()"
    with pytest.raises(OSError, match="no space"):
        process.follow([sys.executable, "-c", code], "Running", log=FullDisk(), cwd=tmp_path)  # type: ignore[arg-type]
    assert (tmp_path / "cleaned").is_file()
