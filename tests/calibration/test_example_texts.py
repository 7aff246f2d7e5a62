"""The calibration texts in examples/: their form, and that they don't answer the factual questions."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "examples" / "calibration").glob("*_*"))
QUESTIONS = json.loads((ROOT / "tools" / "factual_questions.json").read_text("utf-8"))


def passages(path: Path) -> list[str]:
    return path.read_text("utf-8").strip().split("\n" if path.suffix == ".jsonl" else "\n\n\n")


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".jsonl"], ids=lambda path: path.name)
def test_dialogues(path: Path) -> None:
    for line in passages(path):
        messages = json.loads(line)["messages"]
        roles = [message["role"] for message in messages]
        assert roles[0] in ("system", "user")
        assert roles[-1] == "assistant"
        assert set(roles) <= {"system", "user", "assistant", "tool"}
        assert all(isinstance(message["content"], str) for message in messages)


def test_texts_are_what_the_readme_lists() -> None:
    assert len(FILES) == 27
    assert {path.suffix for path in FILES} == {".txt", ".jsonl"}
    assert all(len(passages(path)) > 3 for path in FILES)


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question["question"])
def test_no_question_is_answered(question: dict[str, str | list[str]]) -> None:
    """No passage holds the question, or an answer together with what the question is about."""
    assert question["answers"]
    for path in FILES:
        for passage in passages(path):
            words = passage.casefold()
            assert str(question["question"]).casefold() not in words
            if all(key.casefold() in words for key in question["keys"]):
                assert not any(answer.casefold() in words for answer in question["answers"]), (path.name, passage)
