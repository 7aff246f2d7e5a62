"""Tests of d2q_edge.runtime without building anything: hashes, cache, unpacking, errors, the order of the build."""

import hashlib
import importlib.metadata
import io
import json
import os
import stat
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

from d2q_edge.errors import D2QError
from d2q_edge.runtime import build, installed, machine, process, source

HEX = set("0123456789abcdef")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    return tmp_path / "cache" / "d2q-edge" / "runtime"


def _patch(directory: Path, patch: str = "one", code: str = "two") -> Path:
    for part, name, text in (("patches", "0001-x.patch", patch), ("src", "x.c", code)):
        (directory / part).mkdir(parents=True, exist_ok=True)
        (directory / part / name).write_text(text)
    return directory


def _wheel_address(key: str) -> str:
    """How pip writes where a wheel of the cache lies: as an address, with the version's plus sign escaped."""
    return f"file:///home/a%20b/.cache/d2q-edge/runtime/{key}/wheel/llama_cpp_python-0.3.36%2Bd2q.x-py3-none-any.whl"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment of its own for installed packages, with the stock llama-cpp-python in it."""
    directory = tmp_path / "site"
    directory.mkdir()
    monkeypatch.syspath_prepend(str(directory))
    monkeypatch.setattr(build, "library_directory", lambda: tmp_path)
    _put(directory, source.VERSION, None)
    return directory


def _put(site: Path, version: str, note: str | None) -> None:
    """Make `site` look as after pip has installed this version of llama-cpp-python, with this direct_url.json."""
    # Always the same folder: Python reads the version in it, and remembers the folder's name.
    folder = site / "llama_cpp_python-0.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: {version}\n")
    (folder / "direct_url.json").unlink(missing_ok=True)
    if note is not None:
        (folder / "direct_url.json").write_text(note)


class TestSource:
    def test_cache_is_where_the_user_wants_it(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert source.cache_directory() == cache
        for useless in ("", "relative"):
            monkeypatch.setenv("XDG_CACHE_HOME", useless)
            assert source.cache_directory() == Path.home() / ".cache/d2q-edge/runtime"

    def test_hash_depends_on_every_byte_and_name(self, tmp_path: Path) -> None:
        first = source.patch_hash(_patch(tmp_path / "a"))
        assert len(first) == 12
        assert set(first) <= HEX
        assert first == source.patch_hash(_patch(tmp_path / "b"))
        changed = [_patch(tmp_path / "c", patch="One"), _patch(tmp_path / "d", code="Two"), _patch(tmp_path / "e")]
        (changed[2] / "src/x.c").rename(changed[2] / "src/y.c")
        assert len({first, *map(source.patch_hash, changed)}) == 4

    def test_hash_is_never_only_digits(self, tmp_path: Path) -> None:
        hashes = [source.patch_hash(_patch(tmp_path / "a", code=str(i))) for i in range(1000)]
        assert not any(text.isdigit() for text in hashes)

    def test_version_is_the_releases_with_the_hash(self) -> None:
        assert source.runtime_version() == f"0.3.36+d2q.{source.patch_hash()}"

    def test_download_of_another_file_is_refused(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def download(command: list[str], *_: object) -> None:
            (Path(command[command.index("-d") + 1]) / source.SDIST).write_bytes(b"other")

        monkeypatch.setattr(source, "run_logged", download)
        with pytest.raises(D2QError, match="is not the expected file"):
            source.fetch_sdist(cache)
        assert [p for p in cache.rglob("*") if p.is_file()] == []

    def test_damaged_cache_entry_is_downloaded_again(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        content = b"the real one"
        monkeypatch.setattr(source, "SDIST_SHA256", hashlib.sha256(content).hexdigest())
        downloads = []

        def download(command: list[str], *_: object) -> None:
            downloads.append(command)
            (Path(command[command.index("-d") + 1]) / source.SDIST).write_bytes(content)

        monkeypatch.setattr(source, "run_logged", download)
        (cache / "sdist").mkdir(parents=True)
        (cache / "sdist" / source.SDIST).write_bytes(content[:5])
        assert source.fetch_sdist(cache).read_bytes() == content
        assert source.fetch_sdist(cache).read_bytes() == content
        assert len(downloads) == 1

    def test_no_network_is_one_sentence(self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
        monkeypatch.setenv("PIP_RETRIES", "0")
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(D2QError, match=r"can't download llama-cpp-python 0\.3\.36 with pip"):
            source.fetch_sdist(tmp_path / "log")

    @pytest.mark.parametrize("name", ["top/../../evil", "top/link"])
    @pytest.mark.parametrize("filtered", [True, False])
    def test_unpacking_stays_inside(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, filtered: bool
    ) -> None:
        if not filtered:  # Python before 3.10.12 and 3.11.4
            monkeypatch.delattr(tarfile, "data_filter", raising=False)
        archive = tmp_path / "x.tar.gz"
        with tarfile.open(archive, "w:gz") as file:
            for text in ("top/.git/config", "top/good/file"):
                file.addfile(member := tarfile.TarInfo(text), io.BytesIO(b"x" * member.size))
            bad = tarfile.TarInfo(name)
            if name == "top/link":
                bad.type, bad.linkname = tarfile.SYMTYPE, "/etc/passwd"
            file.addfile(bad)
        with pytest.raises((D2QError, tarfile.TarError)):
            source.unpack(archive, tmp_path / "out" / "tree")
        written = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if not p.is_dir()}
        assert written <= {"x.tar.gz", "out/tree/good/file"}


class TestMachine:
    def test_key_names_patch_cpu_and_options(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        del cache
        first = machine.cache_key("abc")
        assert first.startswith("abc-")
        assert first == machine.cache_key("abc")
        monkeypatch.setenv("CMAKE_ARGS", "-DGGML_OPENMP=OFF")
        with_options = machine.cache_key("abc")
        monkeypatch.setattr(machine, "_cpu", lambda: "another")
        assert len({first, with_options, machine.cache_key("abc")}) == 3


class TestProcess:
    def test_output_goes_to_the_log(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        process.run_logged([sys.executable, "-c", "print('hello')"], tmp_path / "log", "Failed")
        assert (tmp_path / "log").read_text().endswith("\nhello\n")
        assert capfd.readouterr() == ("", "")

    def test_failure_is_one_sentence_after_the_last_lines(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        code = "for i in range(100): print('line', i)\nraise SystemExit(3)"
        with pytest.raises(D2QError) as caught:
            process.run_logged([sys.executable, "-c", code], tmp_path / "log", "Building it failed")
        assert str(caught.value) == f"Building it failed; see {tmp_path / 'log'}"
        lines = capfd.readouterr().err.splitlines()
        assert lines[-1] == "line 99"
        assert "line 50" not in lines

    def test_program_that_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(D2QError, match="Failed: no-such-program can't be started"):
            process.run_logged(["no-such-program"], tmp_path / "log", "Failed")


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
        _put(site, source.runtime_version(), json.dumps({"url": _wheel_address(f"{patch}-01234567")}))
        assert installed.tools_directory() == cache / f"{patch}-01234567/tools"
        monkeypatch.setenv("CMAKE_ARGS", "-DGGML_OPENMP=OFF")
        assert installed.tools_directory() == cache / f"{patch}-01234567/tools"
        # d2q-edge has been updated, the runtime hasn't
        _put(site, "0.3.36+d2q.abc", json.dumps({"url": _wheel_address("abc-01234567")}))
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
        _put(site, source.runtime_version(), note)
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
            _put(site, source.runtime_version(), json.dumps({"url": wheel.as_uri(), "archive_info": {}}))

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
        _put(site, source.runtime_version(), None)
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
        _put(site, source.runtime_version(), json.dumps({"url": _wheel_address(key)}))
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
