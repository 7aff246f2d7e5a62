"""Order of the build steps, without building: wheels, tools, server, what stays in the cache."""

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from d2q_edge.errors import D2QError
from d2q_edge.runtime import build, installed, source
from d2q_edge.runtime.tools import SERVER, TOOLS, server_directory, tools_directory
from d2q_edge.utils import machine
from tests.runtime.conftest import make_program, put, wheel_url

Environment = Callable[..., None]


class FakeBuild:
    """Does what pip and CMake would do; `steps` is what ran."""

    def __init__(self, site: Path) -> None:
        self.steps: list[str] = []
        self.configured: list[str] = []
        self.site, self.fails, self.npm_works = site, "", True

    def install(self, tools: bool = False, server: bool = False, page: bool = True) -> installed.RuntimeInfo:
        hooks = {"run": self.run, "prepare_tree": self.prepare, "patch_server": self.patch}
        return build.install(tools, server, page=page, **hooks)  # type: ignore[arg-type]

    def patch(self, tree: Path, log: Path) -> None:
        del log
        assert tree.is_dir()
        self.steps.append("patch")

    def prepare(self, tree: Path, log: Path) -> None:
        del log
        tree.mkdir()
        self.steps.append("prepare")

    def run(self, command: list[object], log: Path, failure: str, **_: object) -> None:
        words = [str(word) for word in command]
        if self.fails and self.fails in failure:
            log.write_text("error")
            raise D2QError(failure)
        if "wheel" in words:
            self.steps.append("wheel")
            out = Path(words[words.index("--wheel-dir") + 1])
            out.mkdir()
            (out / "x.whl").touch()
        elif "--build" in words:
            self.steps.append("server" if SERVER in words else "tools")
            folder = Path(words[words.index("--build") + 1])
            (folder / "bin").mkdir(parents=True, exist_ok=True)
            for name in (*words[words.index("--target") + 1 :], "libllama.so.0", "unrelated"):
                (folder / "bin" / name).touch()
            if "-DLLAMA_BUILD_UI=ON" in self.configured and self.npm_works:
                (folder / build.PAGE).parent.mkdir(parents=True)
                (folder / build.PAGE).touch()
        elif "--force-reinstall" in words:
            wheel = Path(words[-1])
            self.steps.append(f"install {wheel.name}")
            record = {"url": wheel.as_uri(), "archive_info": {}}
            put(self.site, source.runtime_version(), json.dumps(record))
        elif words[0] == "cmake":
            self.configured = words


class TestInstall:
    @pytest.fixture
    def fake(self, cache: Path, site: Path) -> FakeBuild:
        del cache
        return FakeBuild(site)

    def test_second_time_nothing_is_built(self, fake: FakeBuild, cache: Path) -> None:
        fake.install()
        fake.install()
        assert fake.steps == ["prepare", "wheel", "install x.whl"]
        assert sorted(p.name for p in next(cache.iterdir()).iterdir()) == ["wheel"]

    def test_wheel_and_tools_share_a_tree(self, fake: FakeBuild) -> None:
        described = fake.install(tools=True)
        assert fake.steps == ["prepare", "wheel", "tools", "install x.whl"]
        assert None not in described.tools.values()
        assert sorted(p.name for p in tools_directory().iterdir()) == sorted([*TOOLS, "libllama.so.0"])

    def test_tools_can_come_later(self, fake: FakeBuild) -> None:
        fake.install()
        fake.install(tools=True)
        assert fake.steps == ["prepare", "wheel", "install x.whl", "prepare", "tools"]

    def test_other_options_are_installed(self, fake: FakeBuild, environment: Environment) -> None:
        fake.install()
        environment(CMAKE_ARGS="-DGGML_OPENMP=OFF")
        fake.install()
        assert fake.steps == ["prepare", "wheel", "install x.whl"] * 2
        fake.install()
        assert len(fake.steps) == 6, "the same options again"
        environment(CMAKE_ARGS=None)
        fake.install()
        assert fake.steps[6:] == ["install x.whl"], "back to the first wheel, which the cache still has"

    def test_tools_outlive_the_options(self, fake: FakeBuild, environment: Environment) -> None:
        environment(CMAKE_ARGS="-DGGML_OPENMP=OFF")
        fake.install(tools=True)
        environment(CMAKE_ARGS=None)
        assert None not in installed.info().tools.values()
        fake.install()
        assert set(installed.info().tools.values()) == {None}, "those options' tools don't belong to this wheel"
        fake.install(tools=True)
        assert None not in installed.info().tools.values()
        assert fake.steps.count("tools") == 2

    def test_installation_of_unknown_origin(self, fake: FakeBuild, site: Path, environment: Environment) -> None:
        put(site, source.runtime_version(), None)
        fake.install(tools=True)
        assert "install x.whl" not in fake.steps
        assert None not in installed.info().tools.values()
        environment(CMAKE_ARGS="-DGGML_OPENMP=OFF")
        fake.install()
        assert fake.steps[-1] == "install x.whl"

    def test_tools_are_not_built_twice_on_windows(self, fake: FakeBuild) -> None:
        fake.install(tools=True)
        for name in TOOLS:
            tool = tools_directory() / name
            tool.rename(tool.with_name(f"{name}.exe"))
        described = fake.install(tools=True)
        assert fake.steps.count("tools") == 1
        assert None not in described.tools.values()

    def test_options_may_be_quoted(self, fake: FakeBuild, environment: Environment) -> None:
        environment(CMAKE_ARGS="-DCMAKE_C_FLAGS='-O3 -g' -DGGML_OPENMP=OFF")
        fake.install(tools=True)
        assert fake.configured[-2:] == ["-DCMAKE_C_FLAGS=-O3 -g", "-DGGML_OPENMP=OFF"]

    def test_open_quote_is_one_sentence(self, fake: FakeBuild, cache: Path, environment: Environment) -> None:
        environment(CMAKE_ARGS="-DCMAKE_C_FLAGS='-O3 -g")
        with pytest.raises(D2QError, match=r"CMAKE_ARGS can't be split into words \(No closing quotation\): -DCMAKE_C"):
            fake.install()
        assert not fake.steps
        assert not cache.exists()

    @pytest.mark.parametrize(
        ("failure", "steps"),
        [("building the runtime failed", ["prepare"]), ("configuring llama.cpp's tools failed", ["prepare", "wheel"])],
    )
    def test_failed_build_leaves_its_log(self, fake: FakeBuild, cache: Path, failure: str, steps: list[str]) -> None:
        fake.fails = failure
        with pytest.raises(D2QError, match=failure):
            fake.install(tools=True)
        files = [p.name for p in cache.rglob("*") if p.is_file()]
        assert sorted(files) == ["build.log"] + ["x.whl"] * ("wheel" in steps), "and what is complete"
        assert fake.steps == steps

    def test_server_is_patched_after_the_tools(self, fake: FakeBuild) -> None:
        described = fake.install(tools=True, server=True, page=False)
        assert fake.steps == ["prepare", "wheel", "tools", "patch", "server", "install x.whl"]
        assert described.server == str(server_directory() / SERVER)
        assert "-DLLAMA_BUILD_UI=OFF" in fake.configured
        assert sorted(p.name for p in server_directory().iterdir()) == sorted([SERVER, "libllama.so.0", "page"])
        fake.install(tools=True, server=True, page=False)
        assert len(fake.steps) == 6

    def test_server_can_come_later(self, fake: FakeBuild, capsys: pytest.CaptureFixture[str]) -> None:
        assert fake.install().server is None
        assert fake.install(server=True, page=False).server
        assert fake.steps == ["prepare", "wheel", "install x.whl", "prepare", "patch", "server"]
        said = capsys.readouterr().err
        assert "Building llama-server on" in said and "which takes about" in said
        assert "comes without its web page" in said

    def test_page_is_built_where_npm_is(
        self, fake: FakeBuild, tmp_path: Path, environment: Environment, capsys: pytest.CaptureFixture[str]
    ) -> None:
        environment(PATH=str(tmp_path / "bin"))
        fake.install(server=True)
        assert "-DLLAMA_BUILD_UI=OFF" in fake.configured
        page = server_directory() / "page" / "index.html"
        assert "The web page has not been built: install npm" in page.read_text()
        make_program(tmp_path / "bin" / "npm")
        fake.npm_works = False
        fake.install(server=True)
        assert "-DLLAMA_BUILD_UI=ON" in fake.configured
        assert "its web page: npm failed, see the log" in capsys.readouterr().err
        fake.npm_works = True
        fake.install(server=True)
        assert not page.exists()
        steps = list(fake.steps)
        fake.install(server=True)
        assert fake.steps == steps

    def test_disk_space_is_checked_first(self, fake: FakeBuild, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def usage(path: Path) -> SimpleNamespace:
            assert path.parent == cache
            return SimpleNamespace(free=(build.SOURCE_SPACE + build.SPACE["wheel"]) << 20)

        monkeypatch.setattr("shutil.disk_usage", usage)
        with pytest.raises(D2QError, match=r"takes \d+ MiB of disk .* has \d+ MiB: free some, or set XDG"):
            fake.install(tools=True)
        assert not fake.steps
        fake.install()
        assert fake.steps == ["prepare", "wheel", "install x.whl"], "the wheel alone takes less"

    def test_full_disk_is_one_sentence(self, fake: FakeBuild, cache: Path) -> None:
        def fill(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with pytest.raises(D2QError, match=r"can't build the runtime in .* \(No space left on device\): free some"):
            build.install(run=fake.run, prepare_tree=fill)
        assert [path.name for path in cache.rglob("*") if path.is_file()] == []

    def test_what_a_killed_build_left_is_removed(self, fake: FakeBuild, cache: Path) -> None:
        left = cache / machine.cache_key(source.patch_hash()) / "work-killed"
        (left / "source").mkdir(parents=True)
        fake.install()
        assert not left.exists()

    def test_given_source_is_kept_for_later_builds(self, fake: FakeBuild, cache: Path, tmp_path: Path) -> None:
        with pytest.raises(D2QError, match=r"can't read .*missing \(No such file or directory\)"):
            build.install(sdist=tmp_path / "missing", run=fake.run, prepare_tree=fake.prepare)
        assert not fake.steps
        fake.install()
        steps = list(fake.steps)
        (tmp_path / "other").write_bytes(b"other")
        with pytest.raises(D2QError, match=r"other isn't llama_cpp_python-0\.3\.36\.tar\.gz"):
            build.install(sdist=tmp_path / "other", run=fake.run, prepare_tree=fake.prepare)
        assert fake.steps == steps, "also where nothing is to be built"

    def test_installed_version_is_left_alone(self, fake: FakeBuild, site: Path) -> None:
        key = machine.cache_key(source.patch_hash())
        put(site, source.runtime_version(), json.dumps({"url": wheel_url(key)}))
        fake.install()
        fake.install()
        assert "install x.whl" not in fake.steps

    def test_cache_that_can_not_be_written(self, fake: FakeBuild, tmp_path: Path, environment: Environment) -> None:
        (tmp_path / "file").touch()
        environment(XDG_CACHE_HOME=str(tmp_path / "file"))
        with pytest.raises(D2QError, match=r"can't be created .*; set XDG_CACHE_HOME"):
            fake.install()


def test_library_does_not_print_on_stdout() -> None:
    code = "from d2q_edge import runtime; runtime.info()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == ""
