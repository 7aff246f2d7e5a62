"""Asking factual questions: which replies are right, fresh conversations, what is counted."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from d2q_edge.runtime.chat import Conversation
from tests.availability import require_runtime
from tools import ask_questions
from tools.ask_questions import ask, is_right


@pytest.mark.parametrize(
    ("reply", "answers"),
    [
        ("The capital is PARIS.", ["Paris"]),
        ("**Paris**, of course", ["Paris"]),
        ("It lies in South\nAmerica.", ["South America"]),
        ("Water is $H_2O$.", ["H2O", "H₂O"]),
        ("Humans breathe with their lungs.", ["lung"]),
        ("At 100°C (212°F)", ["100"]),
        ("There are 8.", ["eight", "8"]),
        ("8", ["eight", "8"]),
        ("Twenty-four", ["24", "twenty-four"]),
        ("1. Spiders\n2. have 8 legs", ["8"]),
    ],
)
def test_right(reply: str, answers: list[str]) -> None:
    assert is_right(reply, answers)


@pytest.mark.parametrize(
    ("reply", "answers"),
    [
        ("", ["Paris"]),
        ("A parish in Parisian style", ["Paris"]),
        ("The Romans", ["Rome"]),
        ("O2", ["O"]),
        ("18, 80, 1,848, 8.5 and 3.8", ["eight", "8"]),
        ("1. one side\n2. another\n3. yet another", ["three", "3"]),
        ("Aus", ["Au"]),
    ],
)
def test_wrong(reply: str, answers: list[str]) -> None:
    assert not is_right(reply, answers)


def test_every_question_is_a_conversation_of_its_own(chat_file: Path) -> None:
    require_runtime()
    questions = ["Who is there?", "What about the sea?", "Who is there, again?"]
    together = ask(chat_file, questions, 8)
    assert list(together) == questions
    for question in questions:
        with Conversation(chat_file, context=256, max_tokens=8, temperature=0) as conversation:
            assert together[question] == "".join(conversation.answer(question)).strip() != ""


class FakeConversation:
    """Models that know some capitals, by the name of their file."""

    knows = {  # noqa: RUF012
        "original.gguf": {"France": "Paris", "Japan": "Tokyo", "Peru": "Lima"},
        "small.gguf": {"France": "Paris", "Japan": "Kyoto", "Peru": "I don't know", "Italy": "Rome"},
        "broken.gguf": {},
    }

    def __init__(self, path: Path, **options: Any) -> None:
        assert options["temperature"] == 0 and options["max_tokens"] == 64
        self.capitals, self.asked = self.knows[path.name], 0

    def __enter__(self) -> "FakeConversation":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def reset(self) -> None:
        self.asked = 0

    def answer(self, question: str) -> Iterator[str]:
        assert self.asked == 0
        self.asked += 1
        country = question.removesuffix("?").split()[-1]
        yield "It's "
        yield self.capitals.get(country, "...")


def test_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask_questions, "Conversation", FakeConversation)
    capitals = {"France": "Paris", "Japan": "Tokyo", "Peru": "Lima", "Italy": "Rome"}
    asked = [{"question": f"What is the capital of {c}?", "answers": [a], "keys": [c]} for c, a in capitals.items()]
    (tmp_path / "questions.json").write_text(json.dumps(asked), "utf-8")
    arguments = ["--questions", tmp_path / "questions.json", "--json", tmp_path / "out.json", *FakeConversation.knows]
    result = CliRunner().invoke(ask_questions.main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert [" ".join(line.split()) for line in result.stdout.splitlines()] == [
        "original 3 of 4 3 of the first file's 3 100%",
        "small 2 of 4 1 of the first file's 3 33%",
        "broken 0 of 4 0 of the first file's 3 0%",
    ]
    files = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert [(file["file"], file["right"], file["kept"]) for file in files[:2]] == [
        ("original.gguf", 3, 3),
        ("small.gguf", 2, 1),
    ]
    assert files[1]["replies"][1] == {
        "question": "What is the capital of Japan?",
        "reply": "It's Kyoto",
        "right": False,
    }


def test_no_right_answer_of_the_original() -> None:
    assert ask_questions.line("small", {"a"}, set(), 4).split()[-1] == "0", "no share of nothing"
