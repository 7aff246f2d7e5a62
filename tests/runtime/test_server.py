"""The server: requests over HTTP to a real process, and what it does before it listens."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from d2q_edge.errors import D2QError
from d2q_edge.runtime.generate import generate
from d2q_edge.runtime.server import serve
from tests.availability import require_runtime, unavailable
from tests.conftest import ExampleFiles
from tests.paths import ROOT

KEY = "secret"


@pytest.fixture(scope="module", autouse=True)
def packages() -> None:
    require_runtime()
    try:
        import uvicorn  # noqa: F401
    except ImportError:
        unavailable("the server's packages are missing: pip install -e '.[dev]'")


@pytest.fixture(scope="module")
def url(chat_file: Path) -> Iterator[str]:
    """Of a server that asks for KEY; it must end in order when it is interrupted."""
    options = ["--port", "0", "--context", "256", "--threads", "1", "--api-key", KEY]
    command = [sys.executable, "-m", "d2q_edge.cli", "serve", str(chat_file), *options]
    # Settings of llama-cpp-python's that would win if they were not kept out.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CONFIG_FILE": "/none.json"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        said = process.stderr.readline()
        match = re.search(r"http://127\.0\.0\.1:\d+/v1", said)
        assert match, said + process.stderr.read()
        yield match[0]
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=30)
    assert (process.returncode, rest) == (0, "")


def ask(url: str, body: Any = None, key: str = KEY) -> Any:
    """The answer, as JSON; as text where it comes in events."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as response:
        text = response.read().decode()
        return json.loads(text) if response.headers["Content-Type"].startswith("application/json") else text


def test_chat(url: str) -> None:
    body = {"messages": [{"role": "user", "content": "Who is there?"}], "max_tokens": 8, "temperature": 0}
    answer = ask(f"{url}/chat/completions", body)
    said = answer["choices"][0]["message"]["content"]
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert said
    assert answer["usage"]["completion_tokens"] == 8
    stream = ask(f"{url}/chat/completions", {**body, "stream": True})
    events = [json.loads(event)["choices"][0] for event in re.findall(r"^data: (\{.*\})$", stream, re.MULTILINE)]
    assert len([event for event in events if event["delta"].get("content")]) > 4, "in pieces"
    assert events[-1]["finish_reason"] == "length"
    assert "data: [DONE]" in stream


def test_completion_is_what_run_prints(url: str, chat_file: Path) -> None:
    body = {"prompt": "The old man", "max_tokens": 12, "temperature": 0}
    said = ask(f"{url}/completions", body)["choices"][0]["text"]
    assert said == "".join(generate(chat_file, "The old man", 12, temperature=0, seed=0))


def test_models_and_keys(url: str) -> None:
    assert [model["id"] for model in ask(f"{url}/models")["data"]] == ["chat"]
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(f"{url}/models", key="other")
    assert error.value.code == 401


def test_conversation_longer_than_the_context(url: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(f"{url}/completions", {"prompt": "word " * 400})
    assert error.value.code == 400
    assert "256" in error.value.read().decode()


class TestBeforeListening:
    @pytest.fixture
    def started(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
        """Addresses that were about to be served; nothing is."""
        import uvicorn

        addresses: list[tuple[str, int]] = []
        monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: addresses.append(sockets[0].getsockname()[:2]))
        return addresses

    def test_says_what_to_know(
        self, example_files: ExampleFiles, started: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
    ) -> None:
        serve(example_files.d2q2, "0.0.0.0", 0, context=100_000, threads=1)
        lines = capsys.readouterr().err.splitlines()
        assert [host for host, _ in started] == ["0.0.0.0"]
        assert "no chat template: use /v1/completions" in lines[0]
        assert "Everybody who can reach this address" in lines[1]
        assert lines[2].endswith(f"is served at http://0.0.0.0:{started[0][1]}/v1 (Ctrl-C ends)")

        from llama_cpp.server import app

        model = next(iter([app._llama_proxy._current_model]))
        assert model.n_ctx() == 2048, "the model's own"
        assert not model._logits_all, "would keep logits of every token"

    def test_says_no_more_than_needed(
        self, chat_file: Path, started: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
    ) -> None:
        serve(chat_file, "::1" if socket.has_ipv6 and _has_ipv6_loopback() else "localhost", 0, context=64)
        assert len(capsys.readouterr().err.splitlines()) == len(started) == 1

    def test_requests_that_cannot_be_carried_out(
        self, chat_file: Path, started: list[tuple[str, int]], tmp_path: Path, without_package: Callable[[str], None]
    ) -> None:
        with pytest.raises(D2QError, match="there is no file"):
            serve(tmp_path / "none.gguf")
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(D2QError, match=rf"can't listen on 127.0.0.1, port {port} \(Address already in use\)"):
                serve(chat_file, "127.0.0.1", port)
        with pytest.raises(D2QError, match=r"can't listen on 256.0.0.1, port 0"):
            serve(chat_file, "256.0.0.1", 0)
        damaged = chat_file.read_bytes().replace(b"blk.3.ffn_down.weight", b"blk.3.ffn_dowm.weight")
        (tmp_path / "bad.gguf").write_bytes(damaged)
        with pytest.raises(D2QError, match=r"llama.cpp can't load .*bad.gguf"):
            serve(tmp_path / "bad.gguf", port=0)
        without_package("uvicorn")
        with pytest.raises(D2QError, match=r"packages are missing: pip install 'd2q-edge\[serve\]'"):
            serve(chat_file)
        assert started == []

    def test_no_runtime(self, chat_file: Path, no_runtime: None) -> None:
        with pytest.raises(D2QError, match="run `d2q-edge runtime install`"):
            serve(chat_file)


def _has_ipv6_loopback() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True
