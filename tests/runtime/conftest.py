"""An empty cache, and an environment with a llama-cpp-python of its own."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from d2q_edge.runtime import source


@pytest.fixture
def cache(tmp_path: Path, environment: Callable[..., None]) -> Path:
    """An empty cache directory."""
    environment(XDG_CACHE_HOME=str(tmp_path / "cache"), CMAKE_ARGS=None)
    return tmp_path / "cache" / "d2q-edge" / "runtime"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of installed packages that hides the real one, with the stock llama-cpp-python in it."""
    directory = tmp_path / "site"
    (directory / "llama_cpp" / "lib").mkdir(parents=True)
    (directory / "llama_cpp" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(directory))
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    put(directory, source.VERSION, None)
    return directory


def make_program(path: Path, script: str = "") -> None:
    """Write a shell script that can be run as a program."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def put(site: Path, version: str, record: str | None) -> None:
    """Make `site` look as if pip had installed this version of llama-cpp-python, with this direct_url.json."""
    # Always the same folder: Python reads the version in it, and remembers the folder's name.
    folder = site / "llama_cpp_python-0.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: {version}\n")
    (folder / "direct_url.json").unlink(missing_ok=True)
    if record is not None:
        (folder / "direct_url.json").write_text(record)


def make_patch(directory: Path, patch: str = "one", code: str = "two") -> Path:
    """Write a small cpp_patch."""
    for part, name, text in (("patches", "0001-x.patch", patch), ("src", "x.c", code)):
        (directory / part).mkdir(parents=True, exist_ok=True)
        (directory / part / name).write_text(text)
    return directory


def wheel_url(key: str) -> str:
    """Return the URL that pip records for a wheel of the cache; the version's plus sign is escaped."""
    return f"file:///home/a%20b/.cache/d2q-edge/runtime/{key}/wheel/llama_cpp_python-0.3.36%2Bd2q.x-py3-none-any.whl"
