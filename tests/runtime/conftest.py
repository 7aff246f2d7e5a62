"""An empty cache and an environment for installed packages."""

from pathlib import Path

import pytest

from d2q_edge.runtime import build, source


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    return tmp_path / "cache" / "d2q-edge" / "runtime"


def make_patch(directory: Path, patch: str = "one", code: str = "two") -> Path:
    """A small cpp_patch."""
    for part, name, text in (("patches", "0001-x.patch", patch), ("src", "x.c", code)):
        (directory / part).mkdir(parents=True, exist_ok=True)
        (directory / part / name).write_text(text)
    return directory


def wheel_address(key: str) -> str:
    """How pip writes where a wheel of the cache lies: as an address, with the version's plus sign escaped."""
    return f"file:///home/a%20b/.cache/d2q-edge/runtime/{key}/wheel/llama_cpp_python-0.3.36%2Bd2q.x-py3-none-any.whl"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment of its own for installed packages, with the stock llama-cpp-python in it."""
    directory = tmp_path / "site"
    directory.mkdir()
    monkeypatch.syspath_prepend(str(directory))
    monkeypatch.setattr(build, "library_directory", lambda: tmp_path)
    put(directory, source.VERSION, None)
    return directory


def put(site: Path, version: str, note: str | None) -> None:
    """Make `site` look as after pip has installed this version of llama-cpp-python, with this direct_url.json."""
    # Always the same folder: Python reads the version in it, and remembers the folder's name.
    folder = site / "llama_cpp_python-0.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: {version}\n")
    (folder / "direct_url.json").unlink(missing_ok=True)
    if note is not None:
        (folder / "direct_url.json").write_text(note)
