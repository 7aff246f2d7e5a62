"""The commands that generate text: run, chat at a terminal and in a pipe, serve; and bench."""

import json
import os
import pty
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from d2q_edge.errors import D2QError
from d2q_edge.options import ServerOptions
from d2q_edge.runtime import llama_server
from d2q_edge.runtime.chat import Conversation
from tests.availability import require_runtime, require_tool
from tests.command_line import Call, refused
from tests.conftest import ExampleFiles
from tests.paths import ROOT

BANNER = "a context of 2048 tokens. /help lists the commands."


@pytest.mark.slow
class TestRun:
    def test_options_reach_the_model(self, d2q: Call, example_files: ExampleFiles) -> None:
        require_runtime()
        options = ("-p", "The old man", "-n", "16", "--threads", "1")
        best = d2q("run", example_files.d2q3, *options, "--temperature", "0")
        assert best.code == 0
        for one in (("--top-k", "1"), ("--top-p", "0"), ("--min-p", "1")):
            assert d2q("run", example_files.d2q3, *options, "--temperature", "1", *one) == best
        more = "--repeat-penalty", "2", "--cache-type-k", "q8_0", "--cache-type-v", "q4_0", "--no-repack"
        other = d2q("run", example_files.d2q3, *options, "--temperature", "0", *more)
        assert (other.code, other.err) == (0, "")
        assert other.out != best.out
        refused(d2q("run", example_files.d2q3, *options, "--lora", "none.gguf"), "there is no file none.gguf")

    def test_ends_where_the_text_ends(self, d2q: Call, example_files: ExampleFiles, tmp_path: Path) -> None:
        """The same file but for one key: a token that it writes is now the one that ends a text."""
        require_runtime()
        options = ("-p", "The old man", "-n", "24", "--temperature", "0", "--threads", "1")
        whole = d2q("run", example_files.d2q3, *options).out
        vocabulary = json.loads((ROOT / "examples/tiny-qwen3/tokenizer.json").read_text("utf-8"))
        comma = vocabulary["model"]["vocab"][","]
        head, mark, _ = whole.partition(",")
        assert mark, whole
        content = example_files.d2q3.read_bytes()
        key = b"tokenizer.ggml.eos_token_id" + (4).to_bytes(4, "little")  # and a uint32
        assert content.count(key) == 1
        at = content.index(key) + len(key)
        (tmp_path / "comma.gguf").write_bytes(content[:at] + comma.to_bytes(4, "little") + content[at + 4 :])
        assert d2q("run", tmp_path / "comma.gguf", *options).out == head + "\n"


@pytest.mark.slow
class TestChat:
    def test_lines_from_a_pipe(self, d2q: Call, chat_file: Path) -> None:
        require_runtime()
        options = ("-n", "8", "--temperature", "0", "--threads", "1")
        question = "Who is there?"
        lines = question, "", "/help", "/nonsense now", question, "/reset", question
        result = d2q("chat", chat_file, *options, stdin="\n".join(lines))
        assert result.code == 0, result.err
        with Conversation(chat_file, max_tokens=8, temperature=0, threads=1) as conversation:
            said = ["".join(conversation.answer(question)) for _ in range(2)]
            conversation.reset()
            said.append("".join(conversation.answer(question)))
        assert result.out == "".join(f"{answer}\n" for answer in said)
        messages = result.err.splitlines()
        assert messages[0] == f"{chat_file}, {BANNER}"
        assert "Ctrl-C stops an answer." in messages
        assert messages[-2:] == ["There is no command /nonsense; /help lists them.", "The conversation is forgotten."]
        again = d2q("chat", chat_file, *options, stdin=f"{question}\n/exit\n{question}\n")
        assert again.out == f"{said[0]}\n"

    def test_refusals(self, d2q: Call, chat_file: Path, example_files: ExampleFiles) -> None:
        require_runtime()
        refused(d2q("chat", example_files.d2q2), "has no chat template", "use `d2q-edge run ")
        refused(d2q("chat", "none.gguf"), "there is no file none.gguf")
        result = d2q("chat", chat_file, "--threads", "1", stdin="refuse\nWho is there?\n")
        assert (result.code, result.out) == (1, "")
        assert result.err.splitlines()[-1].endswith("refuses the conversation: such words")

    def test_at_a_terminal(self, chat_file: Path) -> None:
        """Ctrl-C stops an answer and not the program, as a refusal does; Ctrl-D ends it."""
        require_runtime()
        child, terminal = pty.fork()
        if child == 0:
            # An answer may fill the context, which takes seconds: there is time to stop it.
            arguments = [sys.executable, "-m", "d2q_edge.cli", "chat", str(chat_file), "--threads", "1", "--seed", "1"]
            os.execve(sys.executable, arguments, {**os.environ, "PYTHONPATH": str(ROOT)})
        screen = _Screen(terminal)
        screen.wait_for(BANNER + "\r\n> ")
        os.write(terminal, b"Who is there?\n")
        screen.wait_for("Who is there?\r\n", more=20)
        os.write(terminal, b"\x03")
        screen.wait_for("[stopped]\r\n> ")
        os.write(terminal, b"refuse\n")
        screen.wait_for("Error: the chat template refuses the conversation: such words\r\n> ")
        # Python's readline misses a signal that comes before it waits for keys; a person presses again.
        screen.wait_for("Ctrl-D or /exit ends.\r\n> ", press=b"\x03")
        os.write(terminal, b"\x04")
        _, status = os.waitpid(child, 0)
        os.close(terminal)
        assert os.waitstatus_to_exitcode(status) == 0


class _Screen:
    """What a program wrote to its terminal."""

    def __init__(self, terminal: int) -> None:
        self.terminal = terminal
        self.text = ""

    def wait_for(self, expected: str, more: int = 0, press: bytes = b"") -> None:
        """Read until `expected`, and `more` characters after it, have come; they are then forgotten.

        `press` is typed first, and again in every second in which nothing comes.
        """
        deadline = time.monotonic() + 120
        os.write(self.terminal, press)
        while (at := self.text.find(expected)) < 0 or len(self.text) < at + len(expected) + more:
            assert time.monotonic() < deadline, f"{expected!r} isn't in {self.text!r}"
            if select.select([self.terminal], [], [], 1)[0]:
                self.text += os.read(self.terminal, 65536).decode(errors="replace")
            else:
                os.write(self.terminal, press)
        self.text = self.text[at + len(expected) + more :]


def test_serve_passes_its_options_on(
    d2q: Call, environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(llama_server, "serve", lambda *arguments: calls.append(arguments))
    environment(D2Q_API_KEY="from the environment")
    assert d2q("serve", "file.gguf").code == 0
    options = ("--host", "::1", "--port", "0", "--context", "64", "--parallel", "3", "--api-key", "key")
    cache = (
        "--threads",
        "4",
        "--cache-type-k",
        "q8_0",
        "--cache-type-v",
        "q4_0",
        "--lora",
        "a.gguf",
        "--lora",
        "b.gguf",
    )
    assert d2q("serve", "file.gguf", *options, *cache, "--", "--mlock", "-np", "1").code == 0
    file, adapters = Path("file.gguf"), (Path("a.gguf"), Path("b.gguf"))
    assert calls == [
        (file, ServerOptions(api_key="from the environment"), ()),
        (file, ServerOptions("::1", 0, 64, 3, "key", 4, "q8_0", "q4_0", adapters), ("--mlock", "-np", "1")),
    ]

    def fail(*_: object) -> None:
        raise D2QError("no compiler:\n install one")

    monkeypatch.setattr(llama_server, "serve", fail)
    refused(d2q("serve", "file.gguf"), "no compiler: install one")
    assert d2q("serve", "file.gguf", "--port", "70000").code == 2
    assert "One file is served, and b.gguf is another." in d2q("serve", "file.gguf", "b.gguf").err


@pytest.mark.slow
class TestBench:
    QUICK = ("--prompt", "8", "--generation", "2", "--rounds", "1")

    def test_json(self, d2q: Call, example_files: ExampleFiles) -> None:
        require_tool("llama-bench")
        files = (example_files.d2q2, example_files.d2q3)
        result = d2q("bench", *files, "--stock", example_files.f16, "--threads", "1,2,1", *self.QUICK, "--json")
        assert (result.code, result.err) == (0, "")
        values = json.loads(result.out)
        assert (values["prompt"], values["generation"], values["threads"], values["rounds"]) == (8, 2, [1, 2], 1)
        phases = {"prompt-1", "prompt-2", "generation-1", "generation-2"}
        for key in ("tokens_per_second", "speed_ratios"):
            assert values[key].keys() == {str(path) for path in files}
            assert all(row.keys() == phases and min(row.values()) > 0 for row in values[key].values())
        assert values["stock_tokens_per_second"].keys() == phases

    def test_text(self, d2q: Call, example_files: ExampleFiles) -> None:
        require_tool("llama-bench")
        result = d2q("bench", example_files.d2q2, "--threads", "1", *self.QUICK)
        assert (result.code, result.err) == (0, "")
        assert [line.split()[0] for line in result.out.splitlines()] == ["tokens/s", str(example_files.d2q2)]

    def test_bad_requests(self, d2q: Call, example_files: ExampleFiles) -> None:
        refused(d2q("bench", "none.gguf"), "there is no file none.gguf")
        refused(d2q("bench", example_files.d2q2, "--stock", "none.gguf"), "there is no file none.gguf")
        for threads in ("", "0", "1,,2", "two", "-1"):
            result = d2q("bench", example_files.d2q2, "--threads", threads)
            assert (result.code, result.out) == (2, ""), threads
            assert "isn't a number of threads" in result.err
