"""Run programs that take minutes, and show the steps that they count in their output as progress."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from d2q_edge.errors import D2QError
from d2q_edge.utils.progress import INTERVAL, Progress

STEP = re.compile(r"\[ *(\d+)(?:/ *(\d+)|(%))?\]")
"""ninja prints "[12/96]", make "[ 12%]", llama-quantize "[  12/ 291]", and llama-imatrix "[12]" after TOTAL."""
BYTES = re.compile(r"^Progress (\d+) of (\d+)\n", re.MULTILINE)
"""What pip prints of a download with --progress-bar raw."""
TOTAL = re.compile(r"computing over (\d+) chunks")
TAIL = 4000
"""Characters of output that are kept for error messages."""
TAIL_LINES = 15
GRACE = 5.0
"""Seconds that an interrupted program has to clean up."""


def say(message: str) -> None:
    """Print one line on stderr."""
    print(message, file=sys.stderr, flush=True)


def follow(
    command: Sequence[str],
    description: str,
    unit: str = "step",
    *,
    log: IO[bytes] | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    interval: float = INTERVAL,
) -> tuple[int, str]:
    """Run a program with arguments, and show its step counter as progress.

    Args:
        command: program and arguments.
        description, unit, interval: see Progress.
        log: file that gets everything the program prints.
        env: the program's whole environment; None passes on this process's.
        cwd: working directory.

    Returns:
        The exit code (the negative signal number if a signal ended it), and the end of the output.

    Raises:
        OSError: the program can't be started.
    """
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, cwd=cwd
    )
    assert process.stdout is not None
    steps, tail = _Steps(description, unit, interval), ""
    try:
        # Not line by line: llama-imatrix prints many steps into one line.
        while piece := os.read(process.stdout.fileno(), 4096):
            if log is not None:
                log.write(piece)
            tail = tail[-TAIL:] + piece.decode(errors="replace")
            steps.read(tail)
    except BaseException:
        # Ctrl-C reaches the program, too, and pip removes its temporary files then.
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        process.kill()
        raise
    finally:
        steps.close()
        process.wait()
        process.stdout.close()
    return process.returncode, tail


def run_logged(
    command: Sequence[object],
    log: Path,
    failure: str,
    *,
    description: str = "Running",
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> None:
    """Run a program as `follow` does, and append what it prints to a log file.

    Args:
        command: program and arguments, made strings.
        log: path of the file.
        failure: beginning of the error message, for example "building the runtime failed".
        description: label of the progress.
        env: variables added to the environment.
        cwd: working directory.

    Raises:
        D2QError: the program can't be started or fails; its last lines are printed on stderr. Or the log can't be
            written.
    """
    words = [str(word) for word in command]
    with log.open("ab", buffering=0) as file:
        file.write(f"$ {' '.join(words)}\n".encode())
        try:
            code, tail = follow(words, description, log=file, env={**os.environ, **(env or {})}, cwd=cwd)
        except (FileNotFoundError, PermissionError) as error:
            raise D2QError(f"{failure}: {words[0]} can't be started ({error.strerror})") from error
        except OSError as error:
            raise D2QError(f"{failure}: {error.strerror}") from error
    if code:
        say("\n".join(line for line in tail.splitlines()[-TAIL_LINES:] if line.strip()))
        raise D2QError(f"{failure}; see {log}")


class _Steps:
    """Progress of a program, read from its output."""

    def __init__(self, description: str, unit: str, interval: float) -> None:
        self._description, self._unit, self._interval = description, unit, interval
        self._progress: Progress | None = None
        self._announced = 0

    def read(self, output: str) -> None:
        """Go to the last step that the output counts."""
        if found := BYTES.findall(output):
            self._go_to(int(found[-1][0]), int(found[-1][1]), unit_scale=True)
            return
        if totals := TOTAL.findall(output):
            self._announced = int(totals[-1])
        counters = STEP.findall(output)
        if not counters and self._progress is not None:
            return
        step, total, percent = counters[-1] if counters else ("0", "", "")
        self._go_to(int(step), 100 if percent else int(total or self._announced))

    def _go_to(self, step: int, count: int, unit_scale: bool = False) -> None:
        if not count or step > count:
            return
        # A build can count several times: one program after the other, or once more after CMake has run again.
        if self._progress is None or self._progress.total != count or step < self._progress.done:
            self.close()
            unit = "B" if unit_scale else self._unit
            self._progress = Progress(self._description, count, unit, unit_scale=unit_scale, interval=self._interval)
        if step > self._progress.done:
            self._progress.update(step - self._progress.done)

    def close(self) -> None:
        """Close the bar."""
        if self._progress is not None:
            self._progress.__exit__(None, None, None)
