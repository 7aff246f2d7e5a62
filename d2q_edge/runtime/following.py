"""Run one of llama.cpp's tools that takes minutes, with a progress bar made of what it prints."""

import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

from tqdm import tqdm

from d2q_edge.errors import D2QError
from d2q_edge.runtime.installed import find_tool, tool_environment

STEP = re.compile(r"\[ *(\d+)(?:/ *(\d+))?\]")
"""How they say how far they are: llama-quantize "[  12/ 291]", llama-imatrix "[12]" ..."""
TOTAL = re.compile(r"computing over (\d+) chunks")
"""... after having said how many there will be."""
TAIL = 4000
"""Characters of the output that are kept for an error's message."""


def follow_tool(name: str, *arguments: object, what: str, unit: str) -> None:
    """Run a tool and show how far it is.

    Args:
        name: one of runtime.TOOLS.
        arguments: its words.
        what: the progress bar's label.
        unit: what it counts.

    Raises:
        D2QError: the tool has not been built, or fails; the message ends with the last lines that it printed.
    """
    command = [str(find_tool(name)), *map(str, arguments)]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=tool_environment()
    )
    said = ""
    try:
        with tqdm(desc=what, unit=unit, disable=None) as progress:
            # Not line by line: llama-imatrix writes many steps into one line.
            while process.stdout and (piece := os.read(process.stdout.fileno(), 4096)):
                said = said[-TAIL:] + piece.decode(errors="replace")
                _advance(progress, said)
        code = process.wait()
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()
    if code:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        # They print from a thread that nobody waits for at the end, so that the last lines can be missing.
        reason = " ".join(lines[-3:]) or f"it said nothing; to see why, run {shlex.join(command)}"
        raise D2QError(f"{Path(command[0]).name} failed ({_ending(code)}): {reason}")


def _ending(code: int) -> str:
    """How a process ended."""
    return f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"


def _advance(progress: "tqdm[None]", said: str) -> None:
    """Move the bar to the last step in the text."""
    if found := TOTAL.findall(said):
        progress.total = int(found[-1])
    if found := STEP.findall(said):
        step, total = found[-1]
        progress.total = int(total) if total else progress.total
        progress.update(int(step) - progress.n)
