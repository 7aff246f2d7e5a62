"""The order of the build, without building anything: programs, wheels, tools."""

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from d2q_edge.errors import D2QError
from d2q_edge.runtime import build, installed, source
from d2q_edge.utils import machine
from tests.runtime.conftest import put, wheel_address

HEX = set("0123456789abcdef")


def _program(directory: Path, name: str, output: str = "") -> None:
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text(f"#!/bin/sh\necho '{output}'\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


class TestPrograms:
    @pytest.fixture
    def programs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A PATH with fakes of everything a build needs, and a Python outside it."""
        directory = tmp_path / "bin"
        for name in ("cc", "c++", "make", "patch"):
            _program(directory, name)
        _program(directory, "cmake", "cmake version 3.25.1")
        _program(tmp_path, "python")
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
        monkeypatch.setenv("PATH", str(directory))
        return directory

    def test_all_there(self, programs: Path) -> None:
        assert programs.is_dir()
        build.check_programs()

    def test_missing_ones_are_named_with_their_packages(self, programs: Path) -> None:
        for name in ("cmake", "c++"):
            (programs / name).unlink()
        with pytest.raises(
            D2QError, match=r"install a C\+\+ compiler, cmake first .*apt install build-essential cmake"
        ):
            build.check_programs()

    def test_old_cmake(self, programs: Path) -> None:
        _program(programs, "cmake", "cmake version 3.18.4")
        with pytest.raises(D2QError, match=r"CMake 3\.21 or newer, not cmake version 3\.18\.4"):
            build.check_programs()


class TestInstall:
    @pytest.fixture
    def steps(self, cache: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Replaces what takes time; the list collects what would have run."""
        del cache
        done: list[str] = []

        def prepare(tree: Path, log: Path) -> None:
            del log
            tree.mkdir()
            done.append("prepare")

        def pip_install(wheel: Path, log: Path) -> None:
            del log
            done.append(f"install {wheel.name}")
            put(site, source.runtime_version(), json.dumps({"url": wheel.as_uri(), "archive_info": {}}))

        monkeypatch.setattr(build, "check_programs", lambda: None)
        monkeypatch.setattr(source, "prepare", prepare)
        monkeypatch.setattr(build, "_pip_install", pip_install)

        def run(command: list[object], log: Path, failure: str, **_: object) -> None:
            words = [str(word) for word in command]
            if "wheel" in words:
                done.append("wheel")
                out = Path(words[words.index("--wheel-dir") + 1])
                out.mkdir()
                (out / "x.whl").touch()
            elif "--build" in words:
                done.append("tools")
                binaries = Path(words[words.index("--build") + 1]) / "bin"
                binaries.mkdir(parents=True)
                for name in (*installed.TOOLS, "libllama.so.0", "unrelated"):
                    (binaries / name).touch()

        monkeypatch.setattr(build, "run_logged", run)
        return done

    def test_second_time_nothing_is_built(self, steps: list[str], cache: Path) -> None:
        build.install()
        build.install()
        assert steps == ["prepare", "wheel", "install x.whl"]
        assert sorted(p.name for p in next(cache.iterdir()).iterdir()) == ["wheel"]

    def test_wheel_and_tools_share_a_tree(self, steps: list[str]) -> None:
        described = build.install(tools=True)
        assert steps == ["prepare", "wheel", "tools", "install x.whl"]
        assert None not in described.tools.values()
        assert sorted(p.name for p in installed.tools_directory().iterdir()) == sorted(
            [*installed.TOOLS, "libllama.so.0"]
        )

    def test_tools_can_come_later(self, steps: list[str]) -> None:
        build.install()
        build.install(tools=True)
        assert steps == ["prepare", "wheel", "install x.whl", "prepare", "tools"]

    def test_other_options_are_installed(self, steps: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        build.install()
        monkeypatch.setenv("CMAKE_ARGS", "-DGGML_OPENMP=OFF")
        build.install()
        assert steps == ["prepare", "wheel", "install x.whl"] * 2
        build.install()
        assert len(steps) == 6, "the same options again"
        monkeypatch.delenv("CMAKE_ARGS")
        build.install()
        assert steps[6:] == ["install x.whl"], "back to the first wheel, which the cache still has"

    def test_tools_outlive_the_options(self, steps: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CMAKE_ARGS", "-DGGML_OPENMP=OFF")
        build.install(tools=True)
        monkeypatch.delenv("CMAKE_ARGS")
        assert None not in installed.info().tools.values()
        build.install()
        assert set(installed.info().tools.values()) == {None}, "those options' tools don't belong to this wheel"
        build.install(tools=True)
        assert None not in installed.info().tools.values()
        assert steps.count("tools") == 2

    def test_installation_of_unknown_origin(
        self, steps: list[str], site: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put(site, source.runtime_version(), None)
        build.install(tools=True)
        assert "install x.whl" not in steps
        assert None not in installed.info().tools.values()
        monkeypatch.setenv("CMAKE_ARGS", "-DGGML_OPENMP=OFF")
        build.install()
        assert steps[-1] == "install x.whl"

    def test_tools_are_not_built_twice_on_windows(self, steps: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        build.install(tools=True)
        for name in installed.TOOLS:
            tool = installed.tools_directory() / name
            tool.rename(tool.with_name(f"{name}.exe"))
        monkeypatch.setattr(sys, "platform", "win32")
        described = build.install(tools=True)
        assert steps.count("tools") == 1
        assert None not in described.tools.values()

    def test_options_may_be_quoted(self, steps: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        configured: list[object] = []

        def configure(command: list[object], log: Path, failure: str, **_: object) -> None:
            del log
            configured.extend(command)
            raise D2QError(failure)

        monkeypatch.setenv("CMAKE_ARGS", "-DCMAKE_C_FLAGS='-O3 -g' -DGGML_OPENMP=OFF")
        build.install()
        monkeypatch.setattr(build, "run_logged", configure)
        with pytest.raises(D2QError, match=r"configuring llama\.cpp's tools failed"):
            build.install(tools=True)
        assert steps[-1] == "prepare"
        assert configured[-2:] == ["-DCMAKE_C_FLAGS=-O3 -g", "-DGGML_OPENMP=OFF"]

    def test_open_quote_is_one_sentence(self, steps: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CMAKE_ARGS", "-DCMAKE_C_FLAGS='-O3 -g")
        with pytest.raises(D2QError, match=r"CMAKE_ARGS can't be split into words \(No closing quotation\): -DCMAKE_C"):
            build.install()
        assert not steps
        assert not cache.exists()

    def test_failed_build_leaves_only_its_log(
        self, steps: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(command: list[object], log: Path, failure: str, **_: object) -> None:
            log.write_text("error")
            raise D2QError(failure)

        monkeypatch.setattr(build, "run_logged", fail)
        with pytest.raises(D2QError, match="building the runtime failed"):
            build.install()
        assert [p.name for p in cache.rglob("*") if p.is_file()] == ["build.log"]
        assert steps == ["prepare"]

    def test_installed_version_is_left_alone(self, steps: list[str], site: Path) -> None:
        key = machine.cache_key(source.patch_hash())
        put(site, source.runtime_version(), json.dumps({"url": wheel_address(key)}))
        build.install()
        build.install()
        assert "install x.whl" not in steps

    def test_cache_that_can_not_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        with pytest.raises(D2QError, match=r"can't be created .*; set XDG_CACHE_HOME"):
            build.install()


def test_library_does_not_print_on_stdout() -> None:
    code = "from d2q_edge import runtime; runtime.info()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == ""
