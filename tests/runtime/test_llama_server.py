"""`serve`: what it says and refuses before and after llama-server starts, and how it ends."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest

from d2q_edge.errors import D2QError
from d2q_edge.export.model_file import export
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.options import ServerOptions
from d2q_edge.runtime import llama_server
from d2q_edge.runtime.generate import generate
from d2q_edge.runtime.llama_server import arguments, serve
from d2q_edge.runtime.tools import server_directory
from tests.availability import require_server
from tests.checkpoints import EXAMPLE
from tests.command_line import python
from tools import served


@pytest.fixture
def llama() -> Path:
    return require_server()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Command lines of servers that were about to be started; none is."""
    commands: list[list[str]] = []

    class Process:
        def __init__(self, path: Path, command: list[str], api_key: str | None) -> None:
            del path
            commands.append([*command, *([f"key {api_key}"] if api_key else [])])

        def run(self) -> None:
            return

    monkeypatch.setattr(llama_server, "_Process", Process)
    return commands


def ask(url: str, path: str, body: Any) -> Any:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


class TestBeforeTheStart:
    def test_options_are_llama_servers(self, chat_file: Path, tmp_path: Path) -> None:
        options = ServerOptions("::1", 9, 100, 3, "key", 5, "q8_0", "q4_0", (Path("a"), Path("b")), repack=False)
        line = " ".join(arguments(GGUFFile(chat_file), options, tmp_path / "none"))
        assert line.startswith(f"--model {chat_file} --alias chat --host ::1 --port 9 --ctx-size 300 --parallel 3 ")
        assert " --threads 5 --threads-batch 5 --cache-type-k q8_0 --cache-type-v q4_0 " in line
        assert " --no-repack --lora a --lora b " in line
        assert "key" not in line.split(), "everybody on the machine could read it"
        assert "--path" not in line

    def test_commas_and_quotes_in_names(self, chat_file: Path, tmp_path: Path) -> None:
        """llama-server takes several adapters as a line of a CSV file, and several aliases between commas."""
        (tmp_path / "a, b.gguf").symlink_to(chat_file)
        options = ServerOptions(lora=(Path("a b"), Path('c, "d"'), Path('e"f')))
        line = arguments(GGUFFile(tmp_path / "a, b.gguf"), options, tmp_path)
        assert line[line.index("--alias") + 1] == "a_ b"
        adapters = [line[at + 1] for at, word in enumerate(line) if word == "--lora"]
        assert adapters == ["a b", '"c, ""d"""', '"e""f"']

    def test_context_is_at_most_the_models(self, chat_file: Path, tmp_path: Path) -> None:
        line = arguments(GGUFFile(chat_file), ServerOptions(context=100_000), tmp_path)
        assert line[line.index("--ctx-size") + 1] == str(2048 * 2)
        assert line[-2:] == ["--path", str(tmp_path)], "the page that stands in for the web page"

    def test_says_what_to_know(
        self, started: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        program = Path("/llama/llama-server")
        export(EXAMPLE, tmp_path / "f16.gguf", "f16")
        capsys.readouterr()
        serve(tmp_path / "f16.gguf", ServerOptions("0.0.0.0", 0), ("--x",), program)
        lines = capsys.readouterr().err.splitlines()
        assert "no chat template: use /v1/completions" in lines[0]
        assert "Everybody who can reach this address" in lines[1]
        assert (started[0][0], started[0][-1]) == (str(program), "--x")

    def test_says_no_more_than_needed(
        self, chat_file: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]
    ) -> None:
        host = "::1" if socket.has_ipv6 and _has_ipv6_loopback() else "localhost"
        serve(chat_file, ServerOptions(host, 0, api_key="k"), program=Path("x"))
        assert capsys.readouterr().err == ""
        assert started[0][-1] == "key k"

    def test_requests_that_cannot_be_carried_out(
        self, chat_file: Path, started: list[list[str]], tmp_path: Path
    ) -> None:
        with pytest.raises(D2QError, match="there is no file"):
            serve(tmp_path / "none.gguf", ServerOptions())
        (tmp_path / "text.gguf").write_text("x" * 100)
        with pytest.raises(D2QError, match="isn't a GGUF file"):
            serve(tmp_path / "text.gguf", ServerOptions())
        with pytest.raises(D2QError, match="there is no adapter none"):
            serve(chat_file, ServerOptions(lora=(Path("none"),)))
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(D2QError, match=rf"can't listen on 127.0.0.1, port {port} \(Address already in use\)"):
                serve(chat_file, ServerOptions(port=port))
        with pytest.raises(D2QError, match=r"can't listen on 256.0.0.1, port 0"):
            serve(chat_file, ServerOptions("256.0.0.1", 0))
        assert started == []

    def test_is_built_when_it_is_missing(
        self,
        chat_file: Path,
        started: list[list[str]],
        cache: Path,
        site: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        del cache, site

        def install(server: bool) -> None:
            assert server
            server_directory().mkdir(parents=True)
            (server_directory() / "llama-server").touch()

        monkeypatch.setattr(llama_server, "install", install)
        serve(chat_file, ServerOptions(port=0))
        assert capsys.readouterr().err == "llama-server isn't built yet; this is needed once.\n"
        assert started[0][0] == str(server_directory() / "llama-server")
        serve(chat_file, ServerOptions(port=0))
        assert capsys.readouterr().err == ""


@pytest.mark.slow
class TestRunning:
    def test_completion_is_what_run_prints(self, llama: Path, chat_file: Path) -> None:
        with served.serve(chat_file, "--threads", 1, "--context", 256) as server:
            body = {"prompt": "The old man", "max_tokens": 24, "temperature": 0}
            said = ask(server.url, "/v1/completions", body)["choices"][0]["text"]
        assert said == "".join(generate(chat_file, "The old man", 24, temperature=0, seed=0))

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_ends_in_order_while_it_answers(self, llama: Path, chat_file: Path, number: signal.Signals) -> None:
        with _serving(chat_file) as (process, url):
            body = {"prompt": "Once", "n_predict": -1, "stream": True, "ignore_eos": True}
            request = urllib.request.Request(f"{url}/completion", json.dumps(body).encode())
            with urllib.request.urlopen(request, timeout=60) as stream:
                assert stream.readline().startswith(b"data: ")
                child = psutil.Process(process.pid).children()[0]
                process.send_signal(number)
                out, err = process.communicate(timeout=20)
        assert (process.returncode, out, err) == (0, "", "")
        assert not child.is_running()

    @pytest.mark.skipif(not Path("/proc").exists(), reason="Linux")
    def test_does_not_outlive_its_parent(self, llama: Path, chat_file: Path) -> None:
        with _serving(chat_file) as (process, _):
            child = psutil.Process(process.pid).children()[0]
            process.kill()
            deadline = time.monotonic() + 20
            # Nobody may be there to reap it.
            while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
                assert time.monotonic() < deadline
                time.sleep(0.02)

    def test_what_llama_server_refuses(self, llama: Path, chat_file: Path, tmp_path: Path) -> None:
        damaged = chat_file.read_bytes().replace(b"blk.3.ffn_down.weight", b"blk.3.ffn_dowm.weight")
        (tmp_path / "bad.gguf").write_bytes(damaged)
        with pytest.raises(D2QError, match=r"can't serve .*bad.gguf \(exit code 1\): .*tensor 'blk.3.ffn_down.weight'"):
            serve(tmp_path / "bad.gguf", ServerOptions(port=0))
        # The comma doesn't make two adapters of it: this one is read.
        (tmp_path / 'a, "b".gguf').symlink_to(chat_file)
        for adapter in (chat_file, tmp_path / 'a, "b".gguf'):
            with pytest.raises(D2QError, match=r"expect general.type to be 'adapter'"):
                serve(chat_file, ServerOptions(port=0, lora=(adapter,)))
        with pytest.raises(D2QError, match=r"can't serve .*: invalid argument: --nonsense"):
            serve(chat_file, ServerOptions(port=0), ("--nonsense",))

    def test_a_crash_is_said(self, chat_file: Path, tmp_path: Path) -> None:
        program = tmp_path / "llama-server"
        program.write_text("#!/bin/sh\necho '0.1 I s: listening on http://h:1'\necho '0.2 E f: no luck'\nkill -9 $$\n")
        program.chmod(0o755)
        with pytest.raises(D2QError, match=r"llama-server ended \(killed by SIGKILL\): no luck"):
            serve(chat_file, ServerOptions(port=0), program=program)

    def test_one_that_does_not_end_is_killed(
        self, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        program = tmp_path / "llama-server"
        program.write_text(f"#!/bin/sh\ntrap '' TERM\nkill -TERM {os.getpid()}\nwhile :; do sleep 0.1; done\n")
        program.chmod(0o755)
        monkeypatch.setattr(llama_server, "GRACE", 0.3)
        with pytest.raises(D2QError, match=r"llama-server ended \(killed by SIGKILL\)"):
            serve(chat_file, ServerOptions(port=0), program=program)


class _serving:
    """`d2q-edge serve` as a process of its own, whose end the test looks at."""

    def __init__(self, path: Path) -> None:
        self._context = python("-m", "d2q_edge.cli", "serve", path, "--port", 0, "--threads", 1)

    def __enter__(self) -> tuple[subprocess.Popen[str], str]:
        process = self._context.__enter__()
        found = served.READY.search(line := process.stderr.readline())
        assert found, line + process.stderr.read()
        return process, found[1]

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)


def _has_ipv6_loopback() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True
