"""What is installed, and where its tools are."""

import importlib.metadata
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from d2q_edge.errors import D2QError
from d2q_edge.runtime import installed, source
from d2q_edge.utils import machine
from tests.runtime.conftest import put, wheel_address

HEX = set("0123456789abcdef")


class TestInfo:
    def test_nothing_installed(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        del cache
        monkeypatch.setattr(installed, "installed_version", lambda: None)
        monkeypatch.setattr(installed, "library_directory", lambda: None)
        described = installed.info().to_json()
        assert list(described) == ["version", "patch_hash", "types", "library", "tools"]
        assert json.loads(json.dumps(described)) == {
            "version": None,
            "patch_hash": None,
            "types": [],
            "library": None,
            "tools": dict.fromkeys(installed.TOOLS),
        }
        with pytest.raises(D2QError, match="is not installed: run `d2q-edge runtime install`"):
            installed.require()

    def test_stock_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(installed, "installed_version", lambda: "0.3.36")
        monkeypatch.setattr(installed, "library_directory", lambda: tmp_path)
        assert installed.info().patch_hash is None
        assert installed.info().types == []
        with pytest.raises(
            D2QError, match=r"0\.3\.36 is installed without the d2q types: run `d2q-edge runtime install`"
        ):
            installed.require()

    def test_patched_package_without_usable_libraries(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(installed, "installed_version", lambda: "0.3.36+d2q.abc")
        monkeypatch.setattr(installed, "library_directory", lambda: tmp_path)
        (tmp_path / "libggml-base.so").write_bytes(b"not a library")
        assert installed.info().patch_hash == "abc"
        with pytest.raises(D2QError, match="can't be loaded: run `d2q-edge runtime install` again"):
            installed.require()

    def test_other_tables(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if installed.info().patch_hash is None:
            pytest.skip("the patched runtime is not installed")
        monkeypatch.setattr(installed, "TABLE_SHA256", "0" * 64)
        with pytest.raises(D2QError, match="other codebook tables"):
            installed.require()

    def test_tools(self, cache: Path) -> None:
        assert installed.tools_directory().parent.parent == cache
        with pytest.raises(D2QError, match=r"llama-quantize is not built: run `d2q-edge runtime install --tools`"):
            installed.find_tool("llama-quantize")
        installed.tools_directory().mkdir(parents=True)
        tool = installed.tools_directory() / "llama-quantize"
        tool.touch()
        assert installed.find_tool("llama-quantize") == tool
        assert installed.info().tools["llama-quantize"] == str(tool)

    def test_tools_are_those_of_the_installed_wheel(
        self, cache: Path, site: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        patch = source.patch_hash()
        put(site, source.runtime_version(), json.dumps({"url": wheel_address(f"{patch}-01234567")}))
        assert installed.tools_directory() == cache / f"{patch}-01234567/tools"
        monkeypatch.setenv("CMAKE_ARGS", "-DGGML_OPENMP=OFF")
        assert installed.tools_directory() == cache / f"{patch}-01234567/tools"
        # d2q-edge has been updated, the runtime hasn't
        put(site, "0.3.36+d2q.abc", json.dumps({"url": wheel_address("abc-01234567")}))
        assert installed.tools_directory() == cache / machine.cache_key(patch) / "tools"

    def test_windows_has_a_suffix(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "llama-bench").touch()
        (tmp_path / "llama-quantize.exe").touch()
        assert installed.tool_in(tmp_path, "llama-bench") == tmp_path / "llama-bench"
        assert installed.tool_in(tmp_path, "llama-quantize") is None
        monkeypatch.setattr(sys, "platform", "win32")
        assert installed.tool_in(tmp_path, "llama-bench") is None
        assert installed.tool_in(tmp_path, "llama-quantize") == tmp_path / "llama-quantize.exe"

    @pytest.mark.parametrize(
        "note",
        [
            None,
            "",
            "{",
            "[]",
            "{}",
            '{"url": null}',
            '{"url": "file:///home/me/llama-cpp-python", "dir_info": {"editable": true}}',
            '{"url": "https://example.org/llama_cpp_python-0.3.36-py3-none-any.whl", "archive_info": {}}',
        ],
    )
    def test_origin_that_says_nothing(self, cache: Path, site: Path, note: str | None) -> None:
        put(site, source.runtime_version(), note)
        assert installed.installed_key() is None
        assert installed.tools_directory() == cache / machine.cache_key(source.patch_hash()) / "tools"
        assert installed.info().version == source.runtime_version()

    def test_emptied_installation(self, cache: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A dist-info without files, as an interrupted removal leaves it: Pythons differ in what they make of that."""
        del cache
        for file in (site / "llama_cpp_python-0.dist-info").iterdir():
            file.unlink()
        assert installed.installed_key() is None
        assert installed.info().version is None

        def version(name: str) -> str:
            raise KeyError("Version")

        monkeypatch.setattr(importlib.metadata, "version", version)
        assert installed.info().version is None

    def test_module_without_a_spec(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "llama_cpp", ModuleType("llama_cpp"))
        assert installed.library_directory() is None

    def test_failing_tool(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(installed, "find_tool", lambda _: Path("/bin/false"))
        with pytest.raises(D2QError, match="llama-bench failed: /bin/false -m x"):
            installed.run_tool("llama-bench", "-m", "x")

    def test_threads_of_tools_may_spin(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(installed, "find_tool", lambda _: Path("/usr/bin/env"))
        monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        monkeypatch.setenv("OTHER", "1")
        words = installed.run_tool("llama-bench").split()
        assert "OTHER=1" in words
        assert "OMP_WAIT_POLICY=PASSIVE" not in words
