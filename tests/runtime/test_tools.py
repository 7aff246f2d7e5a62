"""llama.cpp's tools: which directory is theirs, how they are run, and the progress they show."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from d2q_edge.errors import D2QError
from d2q_edge.runtime import source
from d2q_edge.runtime.tools import Tools, installed_key, tools_directory
from d2q_edge.utils import machine
from tests.runtime.conftest import put, wheel_url


def test_installed_tools(cache: Path) -> None:
    assert tools_directory().parent.parent == cache
    with pytest.raises(D2QError, match=r"llama-quantize is not built: run `d2q-edge runtime install --tools`"):
        Tools().find("llama-quantize")
    tools_directory().mkdir(parents=True)
    tool = tools_directory() / "llama-quantize"
    tool.touch()
    assert Tools().find("llama-quantize") == tool


def test_tools_are_those_of_the_installed_wheel(cache: Path, site: Path, environment: Callable[..., None]) -> None:
    patch = source.patch_hash()
    put(site, source.runtime_version(), json.dumps({"url": wheel_url(f"{patch}-01234567")}))
    assert tools_directory() == cache / f"{patch}-01234567/tools"
    environment(CMAKE_ARGS="-DGGML_OPENMP=OFF")
    assert tools_directory() == cache / f"{patch}-01234567/tools"
    # d2q-edge has been updated, the runtime hasn't.
    put(site, "0.3.36+d2q.abc", json.dumps({"url": wheel_url("abc-01234567")}))
    assert tools_directory() == cache / machine.cache_key(patch) / "tools"


@pytest.mark.parametrize(
    "record",
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
def test_record_without_a_cached_wheel(cache: Path, site: Path, record: str | None) -> None:
    put(site, source.runtime_version(), record)
    assert installed_key() is None
    assert tools_directory() == cache / machine.cache_key(source.patch_hash()) / "tools"


def test_emptied_installation(site: Path) -> None:
    for file in (site / "llama_cpp_python-0.dist-info").iterdir():
        file.unlink()
    assert installed_key() is None


def test_windows_programs(tmp_path: Path) -> None:
    (tmp_path / "llama-quantize.exe").touch()
    assert Tools(tmp_path).path("llama-quantize") == tmp_path / "llama-quantize.exe"
    assert Tools(tmp_path).path("llama-bench") is None


class TestRun:
    def test_failure(self) -> None:
        with pytest.raises(D2QError, match="false failed: /bin/false -m x"):
            Tools(Path("/bin")).run("false", "-m", "x")

    def test_threads_may_spin(self, environment: Callable[..., None]) -> None:
        environment(OMP_WAIT_POLICY="PASSIVE", OTHER="1")
        words = Tools(Path("/usr/bin")).run("env").split()
        assert "OTHER=1" in words
        assert "OMP_WAIT_POLICY=PASSIVE" not in words


class TestFollow:
    def follow(self, script: str) -> None:
        Tools(Path("/bin")).follow("sh", "-c", script, description="Making it", unit="chunk", interval=0)

    def lines(self, capfd: pytest.CaptureFixture[str]) -> list[str]:
        return [line.split(",")[0] for line in capfd.readouterr().err.splitlines()]

    def test_steps_after_a_total(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.follow(
            "echo '[9] x: computing over 3 chunks'; sleep .1; printf '[1]4.2,'; sleep .1; printf '[2]4,[3]3.9,'"
        )
        assert self.lines(capfd) in (["Making it: 1/3 chunk"], ["Making it: 1/3 chunk", "Making it: 2/3 chunk"])

    def test_steps_with_a_total(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.follow("echo '[   7/ 291] blk.0'; sleep .1; echo '[ 12%] Building'; sleep .1; echo 'warning: x[3]'")
        assert self.lines(capfd) == ["Making it: 7/291 chunk", "Making it: 12/100 chunk"]

    def test_bytes_of_a_download(self, capfd: pytest.CaptureFixture[str]) -> None:
        """As pip prints them, here with an end of a line that comes late."""
        self.follow("printf 'Downloading\nProgress 0 of 76500000\nProgress 23000000 of 765'; sleep .1; echo 00000")
        assert self.lines(capfd) == ["Making it: 23.0M/76.5M B"]

    def test_failure(self) -> None:
        with pytest.raises(D2QError, match=r"^sh failed \(exit code 3\): two three four$"):
            self.follow("echo one; echo two; echo; echo three >&2; echo four; exit 3")

    def test_silent_failure(self) -> None:
        with pytest.raises(D2QError, match=r"^sh failed \(exit code 4\): .*, run /bin/sh -c 'exit 4'$"):
            self.follow("exit 4")
        with pytest.raises(D2QError, match=r"^sh failed \(killed by SIGKILL\): "):
            self.follow("kill -9 $$")
