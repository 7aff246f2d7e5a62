"""Find and run llama.cpp's programs, which `d2q-edge runtime install --tools --server` builds."""

import importlib.metadata
import json
import os
import re
import shlex
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from d2q_edge.errors import D2QError
from d2q_edge.runtime.process import follow
from d2q_edge.runtime.source import PACKAGE, cache_directory, patch_hash, server_hash
from d2q_edge.utils.machine import cache_key
from d2q_edge.utils.progress import INTERVAL

TOOLS = ("llama-quantize", "llama-imatrix", "llama-perplexity", "llama-bench")
SERVER = "llama-server"
CACHED_WHEEL = re.compile(r"/([0-9a-f]+-[0-9a-f]{8})/wheel/[^/]+\.whl$")
"""End of the URL of a wheel in our cache; the group is machine.cache_key."""


def installed_key() -> str | None:
    """Return the cache folder (machine.cache_key) that the installed wheel came from; None if that isn't known.

    Unlike the version it tells CMAKE_ARGS and CPU. pip records the wheel's URL in direct_url.json (PEP 610).
    """
    try:
        record = importlib.metadata.distribution(PACKAGE).read_text("direct_url.json")
        found = CACHED_WHEEL.search(json.loads(record or "{}")["url"])
    except (importlib.metadata.PackageNotFoundError, LookupError, TypeError, ValueError):  # none, or not written by pip
        return None
    return found.group(1) if found else None


def tools_directory() -> Path:
    """Return the directory for the tools: beside the installed wheel, unless that is one of another patch.

    The wheel's CMAKE_ARGS may have been set for the installation only.
    """
    patch, key = patch_hash(), installed_key()
    return cache_directory() / (key if key and key.startswith(f"{patch}-") else cache_key(patch)) / "tools"


def server_directory() -> Path:
    """Return the directory for llama-server, its libraries and its page, beside that of the tools."""
    return tools_directory().with_name(f"server-{server_hash()}")


@dataclass(frozen=True)
class Tools:
    """llama.cpp's tools in one directory; None is that of `runtime install --tools`."""

    directory: Path | None = None

    def path(self, name: str) -> Path | None:
        """Return the path of a tool, or None if it has not been built."""
        directory = self.directory or tools_directory()
        return next((path for path in (directory / name, directory / f"{name}.exe") if path.is_file()), None)

    def find(self, name: str) -> Path:
        """Return the path of a tool, or raise a D2QError if it has not been built."""
        if path := self.path(name):
            return path
        raise D2QError(f"the tool {name} is not built: run `d2q-edge runtime install --tools`")

    def run(self, name: str, *arguments: object) -> str:
        """Run a tool, and return what it prints on stdout.

        Raises:
            D2QError: it has not been built or fails; the message ends with what it printed on stderr.
        """
        command = [str(self.find(name)), *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, env=environment())
        if result.returncode:
            raise D2QError(f"{name} failed: {' '.join(command)}\n{result.stderr[-2000:]}")
        return result.stdout

    def follow(self, name: str, *arguments: object, description: str, unit: str, interval: float = INTERVAL) -> None:
        """Run a tool that takes minutes, and show its progress as process.follow does.

        Raises:
            D2QError: it has not been built or fails; the message ends with the last lines it printed.
        """
        command = [str(self.find(name)), *map(str, arguments)]
        code, tail = follow(command, description, unit, env=environment(), interval=interval)
        if code:
            lines = [line.strip() for line in tail.splitlines() if line.strip()]
            # llama.cpp doesn't wait at the end for the thread that prints: the last lines can be missing.
            reason = " ".join(lines[-3:]) or f"it printed nothing; to see why, run {shlex.join(command)}"
            how = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
            raise D2QError(f"{Path(command[0]).name} failed ({how}): {reason}")


INSTALLED = Tools()


def environment() -> dict[str, str]:
    """Return the environment without OMP_WAIT_POLICY: PASSIVE, which torch wants, makes every ggml barrier a sleep."""
    return {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
