"""What is installed."""

import importlib.metadata
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from d2q_edge.errors import D2QError
from d2q_edge.runtime import installed, source
from d2q_edge.runtime.tools import TOOLS
from tests.availability import require_runtime
from tests.runtime.conftest import put


def test_nothing_installed(cache: Path, no_runtime: None) -> None:
    described = installed.info().to_json()
    assert list(described) == ["version", "patch_hash", "types", "library", "tools", "server"]
    assert json.loads(json.dumps(described)) == {
        "version": None,
        "patch_hash": None,
        "types": [],
        "library": described["library"],
        "tools": dict.fromkeys(TOOLS),
        "server": None,
    }
    with pytest.raises(D2QError, match="is not installed: run `d2q-edge runtime install`"):
        installed.require()


def test_stock_package(site: Path) -> None:
    described = installed.info()
    assert (described.version, described.patch_hash, described.types) == ("0.3.36", None, [])
    with pytest.raises(D2QError, match=r"0\.3\.36 is installed without the d2q types: run `d2q-edge runtime install`"):
        installed.require()
    (site / "llama_cpp" / "lib").rmdir()
    assert installed.info().library is None
    with pytest.raises(D2QError, match="is not installed"):
        installed.require()


def test_patched_package_without_usable_libraries(site: Path) -> None:
    put(site, "0.3.36+d2q.abc", None)
    (site / "llama_cpp" / "lib" / "libggml-base.so").write_bytes(b"not a library")
    assert installed.info().patch_hash == "abc"
    assert installed.info().types == []
    with pytest.raises(D2QError, match="can't be loaded: run `d2q-edge runtime install` again"):
        installed.require()


def test_other_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    require_runtime()
    monkeypatch.setattr(installed, "TABLE_SHA256", "0" * 64)
    with pytest.raises(D2QError, match="other codebook tables"):
        installed.require()


def test_emptied_installation(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dist-info without files, as an interrupted removal leaves it; what Python makes of that differs by version."""
    for file in (site / "llama_cpp_python-0.dist-info").iterdir():
        file.unlink()
    assert installed.info().version is None

    def version(name: str) -> str:
        raise KeyError("Version")

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert installed.info().version is None


def test_module_without_a_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", ModuleType("llama_cpp"))
    assert installed.library_directory() is None


def test_version(site: Path) -> None:
    put(site, source.runtime_version(), None)
    assert installed.info().version == source.runtime_version()
    assert installed.info().patch_hash == source.patch_hash()
