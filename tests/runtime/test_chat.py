"""Conversations with the converted example: what the model reads, and what stays of an answer."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from d2q_edge.errors import D2QError
from d2q_edge.runtime.chat import Conversation
from tests.availability import require_runtime
from tests.conftest import ExampleFiles


@pytest.fixture
def conversation(chat_file: Path) -> Iterator[Conversation]:
    require_runtime()
    with Conversation(chat_file, system="Be brief.", max_tokens=8, temperature=0, context=256) as conversation:
        yield conversation


@pytest.fixture
def read(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that the model is given, special tokens as they are written."""
    texts: list[str] = []
    original = conversation._model.tokenize

    def tokenize(text: str, *, add_special: bool, read_special: bool) -> list[int]:
        assert read_special and not add_special
        texts.append(text)
        return original(text, add_special=add_special, read_special=read_special)

    monkeypatch.setattr(conversation._model, "tokenize", tokenize)
    return texts


def test_the_model_reads_what_transformers_makes_of_the_template(
    conversation: Conversation, read: list[str], chat_model: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_model, local_files_only=True)
    questions = ["Who is there?", "And  what about\nthe sea? "]
    said: list[str] = []
    for question in questions:
        said.append("".join(conversation.answer(question)))
        assert said[-1], "the model says something"
    messages = [{"role": "system", "content": "Be brief."}]
    for index, question in enumerate(questions):
        messages.append({"role": "user", "content": question})
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert read[index] == expected
        assert "<|im_start|>SYSTEM: Be brief.<|im_end|>" in read[index]
        messages.append({"role": "assistant", "content": said[index]})
    assert conversation.messages == messages


def test_reset_leaves_the_system_message(conversation: Conversation, read: list[str]) -> None:
    for _ in range(2):
        assert list(conversation.answer("Who is there?"))
    conversation.reset()
    assert list(conversation.answer("Who is there?"))
    assert read[2] == read[0] != read[1]
    assert len(conversation.messages) == 3


def test_what_was_said_of_a_stopped_answer_stays(conversation: Conversation, read: list[str]) -> None:
    pieces = conversation.answer("Who is there?")
    said = next(pieces) + next(pieces)
    pieces.close()
    assert conversation.messages[1:] == [
        {"role": "user", "content": "Who is there?"},
        {"role": "assistant", "content": said},
    ]
    assert list(conversation.answer("And now?"))
    assert f"<|im_start|>ASSISTANT: {said.strip()}<|im_end|>\n<|im_start|>USER: And now?" in read[1]


def test_a_question_without_an_answer_is_forgotten(conversation: Conversation) -> None:
    before = list(conversation.messages)
    with pytest.raises(D2QError, match=r"no longer fits into 256 tokens: start again with /reset"):
        list(conversation.answer("word " * 300))
    assert conversation.messages == before
    with pytest.raises(D2QError, match="refuses the conversation: such words"):
        list(conversation.answer("refuse"))
    assert conversation.messages == before
    assert list(conversation.answer("Who is there?")), "and the conversation goes on"


def test_files_that_cannot_chat(example_files: ExampleFiles, chat_file: Path, tmp_path: Path) -> None:
    require_runtime()
    with pytest.raises(D2QError, match=r"has no chat template, .*: use `d2q-edge run .*d2q2.gguf -p"):
        Conversation(example_files.d2q2)
    with pytest.raises(D2QError, match="there is no file"):
        Conversation(tmp_path / "none.gguf")
    broken = chat_file.read_bytes().replace(b"{% endfor %}", b"{% endfoo %}")
    (tmp_path / "broken.gguf").write_bytes(broken)
    with pytest.raises(D2QError, match=r"the chat template of .*broken.gguf isn't valid .*endfoo"):
        Conversation(tmp_path / "broken.gguf")


def test_the_models_own_context_is_the_limit(chat_file: Path) -> None:
    require_runtime()
    with Conversation(chat_file, context=100_000) as conversation:
        assert conversation.context == 2048
