"""Only one process writes a file; another one is refused before it touches anything. A lock ends with its holder."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from d2q_edge.errors import D2QError
from d2q_edge.utils.locks import sole_writer
from tests.command_line import Result, refused
from tests.paths import ROOT

HOLD = """
import sys, time
from pathlib import Path
from d2q_edge.utils.locks import sole_writer
with sole_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.gguf"


@contextmanager
def another_process(output: Path) -> Iterator["subprocess.Popen[str]"]:
    """Run a process that holds the lock."""
    command = [sys.executable, "-c", HOLD, str(output)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_lock_file_is_removed(output: Path) -> None:
    for _ in range(2):
        with sole_writer(output):
            assert [path.name for path in output.parent.iterdir()] == ["out.gguf.lock"]
        assert list(output.parent.iterdir()) == []
    with pytest.raises(ZeroDivisionError), sole_writer(output):
        raise ZeroDivisionError
    assert list(output.parent.iterdir()) == []


def test_one_at_a_time(output: Path) -> None:
    with another_process(output) as process:
        message = rf"^another d2q-edge \(process {process.pid}\) is writing {output}; wait for its end, or stop it$"
        with pytest.raises(D2QError, match=message), sole_writer(output):
            pass
        with sole_writer(output.with_name("other.gguf")):
            pass
        assert output.with_name("out.gguf.lock").exists(), "the refused attempt must not take the holder's lock away"
        with pytest.raises(D2QError), sole_writer(output):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        with sole_writer(output):
            pass
    assert list(output.parent.iterdir()) == []


def test_holder_ends_between_open_and_flock(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the locked file is a deleted one, which keeps nobody out: it is opened again."""
    lock, real = output.with_name("out.gguf.lock"), fcntl.flock
    locked: list[int] = []

    def flock(handle: int, operation: int) -> None:
        if not locked:
            lock.unlink()
        locked.append(handle)
        real(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with sole_writer(output):
        assert len(locked) == 2
        assert lock.read_text() == f"{os.getpid()}\n"


def test_file_systems_without_locks(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    done = False
    with sole_writer(output):
        done = True
    assert done and list(output.parent.iterdir()) == []


def test_no_place_for_a_lock(tmp_path: Path) -> None:
    """Writing the output fails with a better message."""
    with sole_writer(tmp_path / "none" / "out.gguf"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("more", [[], ["--no-calibration"], ["--force"], ["--type", "f16"]])
def test_convert(
    d2q: Callable[..., Result], make_checkpoint: Callable[..., Path], output: Path, more: list[str]
) -> None:
    model = make_checkpoint()
    there = {*output.parent.iterdir(), output.with_name("out.gguf.lock")}
    with another_process(output) as process:
        result = d2q("convert", model, "-o", output, *more)
        refused(result, f"(process {process.pid}) is writing")
        assert set(output.parent.iterdir()) == there
        if "--type" not in more:
            assert d2q("convert", model, "-o", output, "--dry-run", *more).code == 0, "a plan writes nothing"
