"""Run long programs: output to a log file, progress on stderr, failure as one sentence.

Knows subprocesses and logs. Does not know what is being built.
"""

import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from d2q_edge.errors import D2QError

STEP = re.compile(r"\[ *(\d+(?:/\d+|%))\]")
"""How ninja ([12/96]) and make ([ 12%]) say how far they are."""
TAIL_LINES = 15


def say(message: str) -> None:
    """One line of progress on stderr."""
    print(message, file=sys.stderr, flush=True)


def run_logged(
    command: Sequence[str | Path],
    log: Path,
    failure: str,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> None:
    """Run `command`, append its output to `log`, and show a compiler's step counter if stderr is a terminal.

    Args:
        command: program and arguments.
        log: the file that gets everything the program prints.
        failure: the error's sentence up to where the log is, for example "building the runtime failed".
        env: variables added to the environment.
        cwd: working directory.

    Raises:
        D2QError: the program can't be started or exits with an error; its last lines go to stderr.
    """
    words = [str(word) for word in command]
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    counter = sys.stderr.isatty()
    with log.open("a", encoding="utf-8") as file:
        file.write("$ " + " ".join(words) + "\n")
        file.flush()
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                cwd=cwd,
                text=True,
                encoding="utf-8",
                errors="replace",
            )
        except OSError as error:
            raise D2QError(f"{failure}: {words[0]} can't be started ({error.strerror})") from error
        with process:
            for line in process.stdout or ():
                file.write(line)
                tail.append(line.rstrip())
                step = STEP.search(line)
                if counter and step:
                    print(f"\r  {step.group(1)}   ", end="", file=sys.stderr, flush=True)
    if counter:
        print("\r", end="", file=sys.stderr)
    if process.returncode:
        say("\n".join(line for line in tail if line))
        raise D2QError(f"{failure}; see {log}")
