"""Processes that one starts for the others: they meet, and they end together."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from d2q_edge.distributed.launch import together
from tests.checkpoints import EXAMPLE
from tests.command_line import Call
from tests.paths import ROOT

BEGIN = """
import os, sys, time
from pathlib import Path
from d2q_edge.distributed.launch import together
place = Path(sys.argv[1])
with together(3, [sys.executable, *sys.argv]):
    rank = os.environ["RANK"]
    (place / f"{rank}.partial").write_text(str(os.getpid()))
    (place / f"{rank}.partial").rename(place / f"{rank}.pid")
    while len(list(place.glob("*.pid"))) < 3:
        time.sleep(0.01)
"""
MEET = """
    import torch
    from d2q_edge.distributed.process_group import ProcessGroup
    processes = ProcessGroup.from_environment(torch.device("cpu"))
    processes.connect()
    total = torch.tensor([1.0 + processes.rank])
    processes.all_reduce([total])
    print(f"{processes.rank} of {processes.world_size}: {total.item()}", flush=True)
"""


@contextmanager
def started(tmp_path: Path, rest: str) -> Iterator[subprocess.Popen[str]]:
    """The first process of a script."""
    script = tmp_path / "script.py"
    script.write_text(BEGIN + rest)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), str(tmp_path)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def all_gone(tmp_path: Path) -> bool:
    """Whether none of the others runs any more, soon."""
    pids = [int(file.read_text()) for file in tmp_path.glob("[12].pid")]
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not any(running(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def running(pid: int) -> bool:
    """A process that has ended, and that nobody has asked about, counts as gone."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_all_meet_and_the_first_speaks(tmp_path: Path) -> None:
    with started(tmp_path, MEET) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out == "0 of 3: 6.0\n"
    assert err == ""
    assert all_gone(tmp_path)


def test_they_may_wait_for_each_other_at_the_end(tmp_path: Path) -> None:
    """As NCCL does when it is given up."""
    rest = """
    import atexit
    def leave():
        if rank == "0":
            (place / "bye").touch()
        while not (place / "bye").exists():
            time.sleep(0.01)
    atexit.register(leave)
"""
    with started(tmp_path, rest) as process:
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert all_gone(tmp_path)


def test_one_that_fails_ends_all(tmp_path: Path) -> None:
    """The first sits where it notices nothing."""
    rest = """
    if rank == "1":
        print("Error: no more", file=sys.stderr)
        sys.exit(3)
    time.sleep(300)
"""
    with started(tmp_path, rest) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 3
    assert (out, err) == ("", "Error: no more\n")
    assert all_gone(tmp_path)


def test_where_all_fail_the_first_says_why(tmp_path: Path) -> None:
    rest = """
    if rank == "0":
        time.sleep(1)
    sys.exit(f"Error: {rank} failed")
"""
    with started(tmp_path, rest) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err == "Error: 0 failed\n"
    assert all_gone(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="only there the system does it")
def test_a_first_that_is_killed_takes_the_others_along(tmp_path: Path) -> None:
    with started(tmp_path, "    time.sleep(300)\n") as process:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("*.pid"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert all_gone(tmp_path)


def test_one_alone_and_one_of_several_start_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with together(1, ["/nonexistent"]):
        assert "WORLD_SIZE" not in os.environ
    monkeypatch.setenv("WORLD_SIZE", "2")
    with together(2, ["/nonexistent"]):
        assert "MASTER_PORT" not in os.environ


class TestOption:
    def test_it_is_for_gpus(self, d2q: Call, tmp_path: Path) -> None:
        result = d2q("convert", EXAMPLE, "-o", tmp_path / "x.gguf", "--gpus", "2", "--device", "cpu")
        assert result.code == 2
        assert "--gpus shares the work among CUDA devices; it doesn't go with --device cpu" in result.err

    def test_that_must_be_there(self, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "d2q_edge.cli", "convert", str(EXAMPLE), "-o", str(tmp_path / "x.gguf")]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [*command, "--gpus", "2"], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 1
        assert done.stderr == "Error: this machine's torch has no cuda device; use --device cpu\n"
        assert list(tmp_path.iterdir()) == []
