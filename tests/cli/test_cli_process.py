"""The command line as a process of its own: signals, closed outputs, and one of several that share the work."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from d2q_edge import runtime
from d2q_edge.errors import D2QError
from tests.checkpoints import EXAMPLE
from tests.command_line import Call
from tests.conftest import ExampleFiles
from tests.paths import ROOT

Make = Callable[..., Path]


class TestProcess:
    """The real thing, with a real terminal signal; everything else runs in this process because starting costs time."""

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_signals(self, make_checkpoint: Make, tmp_path: Path, number: signal.Signals) -> None:
        model = make_checkpoint(hidden_size=64, intermediate_size=128, num_hidden_layers=8)
        # In a job that started in the background, Python would leave SIGINT ignored, and under nohup SIGHUP.
        script = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        script += "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        script += "from d2q_edge.cli import main; main()"
        arguments = ["convert", str(model), "-o", str(tmp_path / "out.gguf"), "--calibration-tokens", "16384"]
        environment: dict[str, Any] = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            first = tmp_path / "out.gguf.work" / "block-0000.safetensors"
            deadline = time.monotonic() + 120
            while not first.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number, err
        assert out == ""
        assert err.endswith("\nInterrupted. A conversion goes on where it stopped when the command is repeated.\n")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf.work", "tiny"]
        assert list(tmp_path.rglob("*.partial")) == []

    def test_torchruns_processes_end_at_once(self, monkeypatch: pytest.MonkeyPatch, d2q: Call) -> None:
        """They may be waiting for each other, where a handler is never called."""
        seen: list[Any] = []

        def info() -> None:
            seen.append(signal.getsignal(signal.SIGTERM))
            raise D2QError("x")

        monkeypatch.setattr(runtime, "info", info)
        monkeypatch.setattr(os, "_exit", sys.exit)
        before = signal.getsignal(signal.SIGTERM)
        for expected in (True, False):
            assert d2q("runtime", "info").code == 1
            assert callable(seen[-1]) == expected
            assert signal.getsignal(signal.SIGTERM) == before
            monkeypatch.setenv("WORLD_SIZE", "2")

    @pytest.mark.parametrize("error", ["d2q_edge.errors.D2QError('x')", "ValueError('x')", "KeyboardInterrupt()"])
    def test_one_of_several_that_fails_waits_for_nobody(self, error: str) -> None:
        """At the end of Python NCCL waits for the other processes, and these may wait for this one."""
        script = f"""
import atexit, sys, threading, time
import d2q_edge.errors
from d2q_edge import cli, runtime

def info():
    raise {error}

runtime.info = info
atexit.register(time.sleep, 300)
threading.Thread(target=time.sleep, args=(300,)).start()
sys.argv = ["d2q-edge", "runtime", "info"]
cli.main()
"""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2"}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == (130 if "Keyboard" in error else 1)
        assert done.stderr.strip()

    @pytest.mark.parametrize("several", [False, True])
    def test_without_stdout(self, several: bool) -> None:
        """`>&-`: there is nowhere to print to, and Python says None."""
        script = "import sys, types; from d2q_edge import cli; "
        if several:
            script += "sys.argv = ['d2q-edge', 'inspect', 'none.gguf']; "
        else:
            script += "cuda = types.SimpleNamespace(is_initialized=lambda: True); "
            script += "sys.modules['torch'] = types.SimpleNamespace(cuda=cuda); sys.argv = ['d2q-edge', '--version']; "
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment |= {"WORLD_SIZE": "2"} if several else {}
        command = ["bash", "-c", 'exec "$0" -c "$1" >&-', sys.executable, f"{script}cli.main()"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        expected = (1, "Error: there is no file none.gguf\n") if several else (0, "")
        assert (done.returncode, done.stderr) == expected

    @pytest.mark.parametrize("gpu", [True, False])
    def test_what_worked_on_a_gpu_ends_at_once(self, gpu: bool) -> None:
        """But for what was registered for the end; what is printed gets out."""
        script = f"""
import atexit, sys, types
from d2q_edge import cli

class Slow:
    def __del__(self):
        print("taken apart")

sys.modules["torch"] = types.SimpleNamespace(cuda=types.SimpleNamespace(is_initialized=lambda: {gpu}))
slow = Slow()
atexit.register(lambda: print("registered", flush=True))
sys.argv = ["d2q-edge", "--version"]
cli.main()
"""
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines()[1:] == ["registered"] + ["taken apart"] * (not gpu)

    @pytest.mark.parametrize(
        "arguments", [["--help"], ["convert", EXAMPLE, "--dry-run", "-o", "x.gguf"]], ids=["help", "plan"]
    )
    def test_nowhere_to_print(self, arguments: list[Any]) -> None:
        with Path("/dev/full").open("w") as full:
            command = [sys.executable, "-m", "d2q_edge.cli", *map(str, arguments)]
            result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert result.returncode == 1
        assert result.stderr.endswith("Error: can't print the result: No space left on device\n")
        assert "Traceback" not in result.stderr and "Exception" not in result.stderr

    def test_reader_that_has_seen_enough(self, example_files: ExampleFiles) -> None:
        command = [sys.executable, "-m", "d2q_edge.cli", "inspect", str(example_files.d2q2)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == ""
        assert process.returncode == 1

    def test_error(self, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "d2q_edge.cli", "inspect", str(tmp_path / "none.gguf")]
        result = subprocess.run(command, capture_output=True, text=True)
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr == f"Error: there is no file {tmp_path / 'none.gguf'}\n"
