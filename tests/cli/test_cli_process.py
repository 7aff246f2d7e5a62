"""The command line as a process of its own: signals, closed outputs, and workers."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import EXAMPLE
from tests.command_line import Call, Result, python, run_python
from tests.conftest import ExampleFiles

Make = Callable[..., Path]
CLI = "-m", "d2q_edge.cli"
WORKER = {"WORLD_SIZE": "2"}


def probe(body: str, environment: dict[str, str] | None = None) -> Result:
    """Run a command with this body."""
    script = f"""
import atexit, signal, sys, threading, time
from d2q_edge import cli
from d2q_edge.errors import D2QError

@cli.cli.command()
def probe():
    {body}

sys.argv = ["d2q-edge", "probe"]
cli.main()
"""
    return run_python("-c", script, environment=environment)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_resumable_work(
    d2q: Call, make_checkpoint: Make, tmp_path: Path, number: signal.Signals
) -> None:
    model, output = make_checkpoint(hidden_size=64, intermediate_size=128, num_hidden_layers=8), tmp_path / "out.gguf"
    # In a job that started in the background, Python would leave SIGINT ignored, and under nohup SIGHUP.
    script = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script += "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
    script += "from d2q_edge.cli import main; main()"
    arguments = "convert", model, "-o", output, "--calibration-tokens", "16384"
    with python("-c", script, *arguments) as process:
        first = tmp_path / "out.gguf.work" / "block-0000.safetensors"
        deadline = time.monotonic() + 120
        while not first.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (128 + number, ""), err
    assert err.endswith("\nInterrupted. A conversion goes on where it stopped when the command is repeated.\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "out.gguf.work", "tiny"]
    assert list(tmp_path.rglob("*.partial")) == []
    assert d2q(*arguments, "--seed", "1").code == 1
    again = d2q(*arguments)
    assert again.code == 0
    assert any(line.startswith("resuming after ") and "out.gguf.work" in line for line in again.err.splitlines())


class TestWorker:
    def test_signals_end_it_at_once(self) -> None:
        """It may be blocked in NCCL, where a handler is never called."""
        body = "print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)"
        assert probe(body) == Result(0, "False\n", "")
        assert probe(body, WORKER) == Result(0, "True\n", "")

    @pytest.mark.parametrize("error", ["D2QError('x')", "ValueError('x')", "KeyboardInterrupt()"])
    def test_that_fails_waits_for_nobody(self, error: str) -> None:
        """At Python's end, NCCL waits for the other workers, and these may wait for this one."""
        body = (
            f"atexit.register(time.sleep, 300); threading.Thread(target=time.sleep, args=(300,)).start(); raise {error}"
        )
        result = probe(body, WORKER)
        assert result.code == (130 if "Keyboard" in error else 1)
        assert result.err.strip()


@pytest.mark.parametrize("environment", [{}, WORKER], ids=["alone", "worker"])
def test_closed_stdout(environment: dict[str, str]) -> None:
    """With `>&-`, Python's sys.stdout is None."""
    close = "import os, sys; os.close(1); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    assert run_python("-c", close, *CLI, "--version", environment=environment) == Result(0, "", "")
    result = run_python("-c", close, *CLI, "inspect", "none.gguf", environment=environment)
    assert result == Result(1, "", "Error: there is no file none.gguf\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["--help"], ["convert", EXAMPLE, "--dry-run", "-o", "x.gguf"]], ids=["help", "plan"]
)
def test_full_disk(arguments: list[Any]) -> None:
    with Path("/dev/full").open("w") as full, python(*CLI, *arguments, stdout=full) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.endswith("Error: can't print the result: No space left on device\n")
    assert "Traceback" not in err and "Exception" not in err


@pytest.mark.slow
def test_reader_that_has_seen_enough(example_files: ExampleFiles) -> None:
    with python(*CLI, "inspect", example_files.d2q2) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        process.wait(timeout=60)
    assert process.returncode == 1


def test_error(tmp_path: Path) -> None:
    missing = tmp_path / "none.gguf"
    assert run_python(*CLI, "inspect", missing) == Result(1, "", f"Error: there is no file {missing}\n")


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys; sys.argv = ['d2q-edge', 'convert', '--help']\n"
        "from d2q_edge.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print({'torch', 'transformers', 'numpy', 'llama_cpp'} & sys.modules.keys())"
    )
    result = run_python("-c", script)
    assert result.code == 0, result.err
    assert result.out.splitlines()[-1] == "set()"
