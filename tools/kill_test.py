"""Kill conversions at random moments, repeat the command, and compare the file with that of an undisturbed run.

    python tools/kill_test.py --kills 200

Half of the kills come after a random time, the other half right before or after a random file operation (rename, flush,
deletion, new directory), which are too short to be hit by the clock. After a kill the conversion is run again; half of
these runs are killed, too. Conversions are forked from a process that has loaded torch, which would take most of the
time of a small one.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch

from d2q_edge.conversion import convert
from d2q_edge.errors import D2QError
from d2q_edge.options import Options

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-qwen3"
OPERATIONS = ((Path, "replace"), (Path, "unlink"), (Path, "mkdir"), (os, "fsync"), (os, "rmdir"), (os, "unlink"))
"""File operations to be killed at; shutil.rmtree uses those of os."""


@dataclass
class Killer:
    """Run and kill the same conversion again and again.

    Attributes:
        convert: writes the file, given its path.
        directory: holds the output and nothing else.
        rng: decides when to kill.
        seconds: duration of an undisturbed run.
        operations: number of its file operations.
        expected: the file that it writes.
        killed: number of kills, by what they left in the directory.
    """

    convert: Callable[[Path], object]
    directory: Path
    rng: random.Random
    seconds: float = 0.0
    operations: int = 0
    expected: bytes = b""
    killed: dict[str, int] = field(default_factory=dict)

    @property
    def output(self) -> Path:
        return self.directory / "out.gguf"

    def prepare(self) -> None:
        """Make the undisturbed run."""
        reader, writer = os.pipe()
        begin = time.monotonic()
        status = self._wait(self._start(lambda: _count_operations(writer)))
        self.seconds = time.monotonic() - begin
        os.close(writer)
        with os.fdopen(reader, "rb") as counted:
            self.operations = len(counted.read())
        if status != 0:
            raise D2QError(f"the undisturbed conversion ended with status {status}")
        self.expected = self.output.read_bytes()
        self.output.unlink()

    def run_and_kill(self) -> bool:
        """Start the conversion and kill it; return False if it ends before."""
        if self.rng.random() < 0.5:
            process = self._start(lambda: None)
            time.sleep(self.rng.uniform(0, self.seconds))
            os.kill(process, signal.SIGKILL)
        else:
            number, late = self.rng.randrange(self.operations), self.rng.random() < 0.5
            process = self._start(lambda: _die_at(number, late))
        status = self._wait(process)
        if status == 0:
            return False
        if status != -signal.SIGKILL:
            raise D2QError(f"a conversion ended with status {status}; {self._state()}")
        state = self._state()
        self.killed[state] = self.killed.get(state, 0) + 1
        return True

    def finish(self) -> None:
        """Run the conversion to its end, compare, and clean up.

        Raises:
            D2QError: it fails, its file differs, or another file is left.
        """
        before = self._state()
        if self.is_done():
            self.compare(before)
            return
        status = self._wait(self._start(lambda: None))
        if status != 0:
            raise D2QError(f"after a kill that left {before}, the conversion ended with status {status}")
        self.compare(before)

    def is_done(self) -> bool:
        """Whether the last run was killed after its work; remove the empty directory and the lock file it may leave."""
        work = self.directory / "out.gguf.work"
        if not self.output.exists() or (work / "settings.json").exists():
            return False
        (self.directory / "out.gguf.lock").unlink(missing_ok=True)
        if work.exists():
            work.rmdir()
        return True

    def compare(self, before: str) -> None:
        """Check the finished file, and remove it.

        Raises:
            D2QError: it differs, or another file is left.
        """
        if self.output.read_bytes() != self.expected:
            raise D2QError(f"after a kill that left {before}, the file differs")
        if left := [path.name for path in self.directory.iterdir() if path != self.output]:
            raise D2QError(f"after a kill that left {before}, a finished conversion leaves {left[0]}")
        self.output.unlink()

    def _start(self, prepare: Callable[[], None]) -> int:
        process = os.fork()
        if process:
            return process
        status = 1
        try:
            torch.set_num_threads(1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            prepare()
            self.convert(self.output)
            status = 0
        except D2QError as error:
            click.echo(f"Error: {error}")
            sys.stdout.flush()
        finally:
            os._exit(status)

    def _wait(self, process: int) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    def _state(self) -> str:
        """Describe what is in the directory."""
        names = sorted(path.name for path in self.directory.rglob("*"))
        blocks = sum(name.startswith("block-") and name.endswith("safetensors") for name in names)
        others = [name for name in names if not name.startswith("block-") or name.endswith("partial")]
        return f"{blocks} blocks, {', '.join(others)}" if names else "nothing"


def _intercept(hook: Callable[[Callable[[], Any]], Any]) -> None:
    """Replace every file operation of this process by a call of `hook` with it."""
    for place, name in OPERATIONS:
        original = getattr(place, name)

        def wrapped(*args: Any, _original: Callable[..., Any] = original, **options: Any) -> Any:
            return hook(lambda: _original(*args, **options))

        setattr(place, name, wrapped)


def _count_operations(writer: int) -> None:
    def count(operation: Callable[[], Any]) -> Any:
        os.write(writer, b".")
        return operation()

    _intercept(count)


def _die_at(number: int, late: bool) -> None:
    """Die before or after file operation `number`, counted from 0."""
    passed = 0

    def count(operation: Callable[[], Any]) -> Any:
        nonlocal passed
        passed += 1
        if passed == number + 1 and not late:
            os.kill(os.getpid(), signal.SIGKILL)
        result = operation()
        if passed == number + 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    _intercept(count)


def run(convert: Callable[[Path], object], kills: int, seed: int) -> dict[str, int]:
    """Kill conversions, and check that each writes the same file in the end.

    Args:
        convert: writes the file, given its path.
        kills: number of kills.
        seed: decides when.

    Returns:
        The number of kills by what they left.

    Raises:
        D2QError: a conversion failed, wrote another file, or left something.
    """
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "out").mkdir()
        killer = Killer(convert, Path(directory) / "out", random.Random(seed))
        killer.prepare()
        with click.progressbar(length=kills, file=sys.stderr) as progress:
            while sum(killer.killed.values()) < kills:
                if not killer.run_and_kill():
                    killer.compare("nothing")
                    continue
                progress.update(1)
                if killer.rng.random() < 0.5 or killer.is_done():
                    killer.finish()
        if any(killer.directory.iterdir()):
            killer.finish()
        return killer.killed


@click.command()
@click.argument("model", type=click.Path(path_type=Path), default=EXAMPLE)
@click.option("--kills", default=200, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--calibration-tokens", default=256, show_default=True)
@click.option("--context", default=32, show_default=True)
@click.option("--refine", is_flag=True, help="Refine, too.")
def main(model: Path, kills: int, seed: int, calibration_tokens: int, context: int, refine: bool) -> None:
    """Kill conversions of MODEL, and check that repeating them gives the same file."""
    options = Options(calibration_tokens=calibration_tokens, context=context, refine=refine)
    try:
        killed = run(lambda output: convert(model, output, options), kills, seed)
    except D2QError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)
    for state, count in sorted(killed.items(), key=lambda item: -item[1]):
        click.echo(f"{count:4}  {state}")
    click.echo(f"{sum(killed.values())} kills, every file was the same")


if __name__ == "__main__":
    main()
