"""What a test that needs the runtime does where there is none."""

import os
from pathlib import Path
from typing import NoReturn

import pytest

from d2q_edge import runtime
from d2q_edge.errors import D2QError
from d2q_edge.runtime import source
from d2q_edge.runtime.tools import SERVER, server_directory


def unavailable(reason: str) -> NoReturn:
    """Skip, or fail where a skipped test would hide a broken runtime (D2Q_REQUIRE_RUNTIME=1)."""
    if os.environ.get("D2Q_REQUIRE_RUNTIME") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def require_runtime() -> None:
    """Go on only where the patched llama_cpp can be imported."""
    try:
        runtime.require()
    except D2QError as error:
        unavailable(str(error))


def require_tool(name: str) -> Path:
    """The path of one of llama.cpp's tools, built from the patched tree."""
    try:
        return runtime.Tools().find(name)
    except D2QError as error:
        unavailable(str(error))


def require_server() -> Path:
    """The path of llama-server, built with this checkout's patches."""
    try:
        return runtime.Tools(server_directory()).find(SERVER)
    except D2QError as error:
        unavailable(str(error))


def fetch_sdist(log: Path) -> Path:
    """llama-cpp-python's source distribution, from the cache or the network."""
    try:
        return source.fetch_sdist(log)
    except D2QError as error:
        unavailable(str(error))
