"""Workers of one command: they connect, and they end together."""

import fcntl
import os
import pty
import signal
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import EXAMPLE
from tests.command_line import Call, Result, python, run_python

pytestmark = pytest.mark.slow
COMMAND = """
import os, signal, sys, time
from pathlib import Path
import click
from d2q_edge import cli
from d2q_edge.distributed.launch import is_worker, launch
from d2q_edge.errors import D2QError

@cli.cli.command()
@click.argument("place", type=Path)
def work(place):
    if not is_worker():
        launch(3, [sys.executable, *sys.argv])
        return
    rank = int(os.environ["RANK"])
    (place / f"{rank}.partial").write_text(str(os.getpid()))
    (place / f"{rank}.partial").rename(place / f"{rank}.pid")
    while len(list(place.glob("*.pid"))) < 3:
        time.sleep(0.01)
"""
CONNECT = """
    import torch
    from d2q_edge.distributed.process_group import ProcessGroup
    processes = ProcessGroup.from_environment(torch.device("cpu"))
    processes.connect()
    total = torch.tensor([1.0 + processes.rank])
    processes.all_reduce([total])
    print(f"{processes.rank} of {processes.world_size}: {total.item()}", flush=True)
"""
SLEEP = "    time.sleep(300)\n"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The command's argument: where every worker writes its process id."""
    (tmp_path / "a $local_rank $$").mkdir()
    return tmp_path / "a $local_rank $$"


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], Path]:
    """script(rest): a program whose command `work` starts three workers, which wait for each other and do the rest."""

    def write(rest: str) -> Path:
        (tmp_path / "script.py").write_text(f"{COMMAND}{rest}\ncli.main()\n")
        return tmp_path / "script.py"

    return write


@contextmanager
def working(script: Path, place: Path, **options: Any) -> Iterator[Any]:
    """The launcher, when all workers have begun."""
    with python(script, "work", place, **options) as process:
        wait_for(process, place, "*.pid")
        yield process


def wait_for(process: Any, place: Path, files: str) -> None:
    """Wait until each worker has made a file."""
    deadline = time.monotonic() + 120
    while len(list(place.glob(files))) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)


def finish(process: Any) -> Result:
    """Wait for the launcher."""
    out, err = process.communicate(timeout=60)
    return Result(process.returncode, out, err)


def pid(place: Path, rank: int) -> int:
    return int((place / f"{rank}.pid").read_text())


def all_gone(place: Path) -> bool:
    """Whether no worker runs any more, soon."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not any(running(pid(place, rank)) for rank in range(3)):
            return True
        time.sleep(0.05)
    return False


def running(process: int) -> bool:
    """A zombie doesn't count."""
    try:
        return ") Z " not in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False


def test_all_connect_and_the_first_prints(script: Callable[[str], Path], place: Path) -> None:
    assert run_python(script(CONNECT), "work", place) == Result(0, "0 of 3: 6.0\n", "")
    assert all_gone(place)


def test_they_may_wait_for_each_other_at_the_end(script: Callable[[str], Path], place: Path) -> None:
    """As NCCL does when it is shut down."""
    rest = """
    import atexit
    def leave():
        if rank == 0:
            (place / "bye").touch()
        while not (place / "bye").exists():
            time.sleep(0.01)
    atexit.register(leave)
"""
    assert run_python(script(rest), "work", place) == Result(0, "", "")


class TestFailure:
    def fail(self, script: Path, place: Path) -> str:
        """What is printed to stderr."""
        result = run_python(script, "work", place)
        assert (result.code, result.out) == (1, "")
        assert all_gone(place)
        return result.err

    def test_one_ends_all(self, script: Callable[[str], Path], place: Path) -> None:
        """The others sit where they notice nothing."""
        rest = "    if rank == 1:\n        raise D2QError('no more: it is over')\n"
        assert self.fail(script(rest + SLEEP), place) == "Error: no more: it is over\n"

    def test_of_all_is_printed_once(self, script: Callable[[str], Path], place: Path) -> None:
        assert self.fail(script("    raise D2QError('no device')\n"), place) == "Error: no device\n"

    def test_cause_comes_before_lost_connections(self, script: Callable[[str], Path], place: Path) -> None:
        rest = """
    if rank == 2:
        raise D2QError("the cause")
    other = int((place / "2.pid").read_text())
    while ") Z " not in Path(f"/proc/{other}/stat").read_text():
        time.sleep(0.001)
    raise ValueError("lost connection")
"""
        assert self.fail(script(rest), place) == "Error: the cause\n"

    def test_bug(self, script: Callable[[str], Path], place: Path) -> None:
        rest = "    if rank == 1:\n        raise ValueError('a bug')\n"
        lines = self.fail(script(rest + SLEEP), place).splitlines()
        assert lines[0] == "Traceback (most recent call last):"
        assert lines[-2:] == [
            "ValueError: a bug",
            "Error: the process of rank 1 failed (ValueError: a bug); repeat the command to continue",
        ]
        assert sum(line.startswith("Traceback") for line in lines) == 1

    def test_crash_shows_what_the_process_printed(self, script: Callable[[str], Path], place: Path) -> None:
        rest = "    if rank == 1:\n        print('out of luck', file=sys.stderr)\n        sys.exit(3)\n"
        said = "out of luck\nError: the process of rank 1 failed (exit code 3); repeat the command to continue\n"
        assert self.fail(script(rest + SLEEP), place) == said


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_ends_all(script: Callable[[str], Path], place: Path, rank: int) -> None:
    with working(script(SLEEP), place) as process:
        os.kill(pid(place, rank), signal.SIGKILL)
        said = f"Error: the process of rank {rank} failed (SIGKILL); repeat the command to continue\n"
        assert finish(process) == Result(1, "", said)
    assert all_gone(place)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_all(script: Callable[[str], Path], place: Path, number: signal.Signals) -> None:
    """Also those that are blocked in NCCL, where Python doesn't see it."""
    rest = """
    if rank == 1:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    (place / f"{rank}.ready").touch()
"""
    with working(script(rest + SLEEP), place) as process:
        wait_for(process, place, "*.ready")
        process.send_signal(number)
        result = finish(process)
        # click begins a new line after ^C.
        assert (result.code, result.out, result.err.strip()) == (128 + number, "", "Interrupted.")
    assert all_gone(place)


def test_an_interrupted_worker_cleans_up(script: Callable[[str], Path], place: Path) -> None:
    rest = """
    try:
        (place / f"{rank}.ready").touch()
        time.sleep(300)
    finally:
        (place / f"{rank}.clean").touch()
"""
    with working(script(rest), place) as process:
        wait_for(process, place, "*.ready")
        process.send_signal(signal.SIGINT)
        finish(process)
    assert len(list(place.glob("*.clean"))) == 3


def test_a_killed_launcher_takes_the_workers_along(script: Callable[[str], Path], place: Path) -> None:
    with working(script(SLEEP), place) as process:
        process.kill()
        assert all_gone(place)


def test_a_closed_terminal_ends_all(script: Callable[[str], Path], place: Path) -> None:
    terminal, theirs = pty.openpty()

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    with working(script(SLEEP), place, stdout=None, stderr=None, preexec_fn=take_terminal):
        os.close(theirs)
        os.close(terminal)
        assert all_gone(place)


def test_nohup(script: Callable[[str], Path], place: Path) -> None:
    rest = "    while not (place / 'go').exists():\n        time.sleep(0.01)\n    print('done')\n"

    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with working(script(rest), place, preexec_fn=ignore) as process:
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        (place / "go").touch()
        assert finish(process) == Result(0, "done\n", "")


class TestOption:
    def test_it_is_for_gpus(self, d2q: Call, tmp_path: Path) -> None:
        result = d2q("convert", EXAMPLE, "-o", tmp_path / "x.gguf", "--gpus", "2", "--device", "cpu")
        assert result.code == 2
        assert "--gpus needs CUDA devices; it can't be used with --device cpu" in result.err

    def test_that_must_be_there(self, tmp_path: Path) -> None:
        arguments = "-m", "d2q_edge.cli", "convert", EXAMPLE, "-o", tmp_path / "x.gguf", "--gpus", "2"
        result = run_python(*arguments, environment={"CUDA_VISIBLE_DEVICES": ""})
        assert result == Result(1, "", "Error: this machine's torch has no cuda device; use --device cpu\n")
        assert list(tmp_path.iterdir()) == []
