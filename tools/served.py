"""Start `d2q-edge serve` as a process, for the tools and tests that talk to it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from d2q_edge.errors import D2QError

ROOT = Path(__file__).parents[1]
READY = re.compile(r"is served at (http://\S+)/v1 ")


@dataclass(frozen=True)
class Server:
    """A running server: its address ("http://127.0.0.1:8000"), and the process of `d2q-edge serve`."""

    url: str
    process: subprocess.Popen[bytes]

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or 0

    @property
    def memory(self) -> int:
        """Bytes of memory that llama-server has (resident set size)."""
        size: int = psutil.Process(self.process.pid).children()[0].memory_info().rss
        return size


@contextmanager
def serve(path: Path, *options: object) -> Iterator[Server]:
    """Serve a file with options of `d2q-edge serve` on a free port, and end the server after the with block.

    Raises:
        D2QError: it doesn't start, or ends otherwise than SIGTERM ends it; the message has what it printed.
    """
    command = [sys.executable, "-m", "d2q_edge.cli", "serve", str(path), "--port", "0", *map(str, options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # Not a pipe, which would be full at some time.
    with tempfile.TemporaryFile("w+") as said, subprocess.Popen(command, stderr=said, env=environment) as process:

        def printed() -> str:
            said.seek(0)
            return said.read()

        try:
            while not (ready := READY.search(printed())):
                if process.poll() is not None:
                    raise D2QError(f"d2q-edge serve doesn't start: {printed()}")
                time.sleep(0.02)
            yield Server(ready[1], process)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
            end = printed()
    if process.returncode:
        raise D2QError(f"d2q-edge serve ended with exit code {process.returncode}: {end[-2000:]}")
