"""Text from the converted example."""

from pathlib import Path

import pytest

from d2q_edge.errors import D2QError
from d2q_edge.runtime.generate import generate
from tests.availability import require_runtime
from tests.conftest import ExampleFiles

PROMPT = "The old man looked out over the"


def test_text(example_files: ExampleFiles) -> None:
    require_runtime()

    def text(tokens: int = 24, temperature: float = 0.8, seed: int = 1) -> str:
        return "".join(generate(example_files.d2q3, PROMPT, tokens, temperature, seed))

    first = text()
    assert len(first.split()) > 5
    assert text() == first
    assert text(seed=2) != first
    assert text(temperature=0) == text(temperature=0, seed=2)
    assert len(text(tokens=3)) < len(first)


def test_prompt_longer_than_the_context(example_files: ExampleFiles) -> None:
    require_runtime()
    with pytest.raises(D2QError, match=r"a text of \d{4} tokens exceeds the context of 2048"):
        list(generate(example_files.f16, "word " * 3000, 8, 0, 0))


def test_no_chat_template_is_read(chat_file: Path, tmp_path: Path) -> None:
    require_runtime()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(chat_file.read_bytes().replace(b"{% endfor %}", b"{% endfoo %}"))
    expected = list(generate(chat_file, PROMPT, 8, 0, 0))
    assert list(generate(broken, PROMPT, 8, 0, 0)) == expected != []


def test_the_context_can_be_set(example_files: ExampleFiles) -> None:
    require_runtime()
    assert len(list(generate(example_files.d2q3, PROMPT, 100, 1, 1, context=64))) < 64
    with pytest.raises(D2QError, match="exceeds the context of 64"):
        list(generate(example_files.d2q3, "word " * 100, 8, 0, 0, context=64))


def test_files_are_checked_at_once(tmp_path: Path, example_files: ExampleFiles) -> None:
    require_runtime()
    with pytest.raises(D2QError, match="there is no file"):
        generate(tmp_path / "none.gguf", PROMPT, 8, 0, 0)
    content = example_files.f16.read_bytes().replace(b"blk.3.ffn_down.weight", b"blk.3.ffn_dowm.weight")
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(D2QError, match=r"llama.cpp can't load .*bad.gguf"):
        generate(tmp_path / "bad.gguf", PROMPT, 8, 0, 0)


def test_no_runtime(example_files: ExampleFiles, no_runtime: None) -> None:
    with pytest.raises(D2QError, match="run `d2q-edge runtime install`"):
        generate(example_files.f16, PROMPT, 8, 0, 0)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("", "the prompt is empty, and the model has no token"), ("a\udcff", "the prompt isn't valid UTF-8")],
)
def test_prompts_that_are_none(example_files: ExampleFiles, prompt: str, message: str) -> None:
    with pytest.raises(D2QError, match=message):
        list(generate(example_files.d2q2, prompt, 4, 0.0, 1))
