"""The bundled calibration texts: their form, their order, and that they don't answer the factual questions."""

import json
from typing import Any

import pytest

from d2q_edge.calibration.chat_template import plain
from d2q_edge.calibration.text import DATA, EVALUATION, MIXTURE, SEPARATOR, Conversation, load_calibration
from tests.paths import ROOT

QUESTIONS = json.loads((ROOT / "tools" / "factual_questions.json").read_text("utf-8"))
PASSAGES = [p if isinstance(p, str) else plain(p) for p in load_calibration("builtin").passages]


def parts() -> dict[str, list[str | Conversation]]:
    """Return the passages of every file, in its order."""
    found: dict[str, list[str | Conversation]] = {}
    for name in MIXTURE:
        content = (DATA / "calibration" / name).read_text("utf-8")
        lines = content.splitlines() if name.endswith(".jsonl") else content.strip().split(SEPARATOR)
        found[name] = [json.loads(line) if name.endswith(".jsonl") else line + SEPARATOR for line in lines]
    return found


def test_all_files_are_used() -> None:
    assert {file.name for file in (DATA / "calibration").iterdir()} == set(MIXTURE)


def test_dialogues() -> None:
    for conversation in parts()["dialogues.jsonl"]:
        assert not isinstance(conversation, str)
        messages: list[dict[str, Any]] = conversation["messages"]
        roles = [message["role"] for message in messages]
        assert roles[0] in ("system", "user")
        assert roles[-1] == "assistant"
        assert set(roles) <= {"system", "user", "assistant", "tool"}
        assert all(isinstance(message["content"], str) for message in messages)


def test_passages_keep_their_order_and_alternate() -> None:
    mixed = load_calibration("builtin").passages
    for passages in parts().values():
        places = [mixed.index(passage) for passage in passages]
        assert places == sorted(places)
        # Each half of the mixture has about half of every part.
        share = sum(place < len(mixed) / 2 for place in places) / len(places)
        assert 0.35 < share < 0.65
    assert len(mixed) == sum(len(passages) for passages in parts().values())


def test_evaluation_text_is_another_one() -> None:
    def shingles(text: str, words: int = 10) -> set[tuple[str, ...]]:
        found = text.casefold().split()
        return set(zip(*(found[i:] for i in range(words)), strict=False))

    evaluation = shingles(EVALUATION.read_text("utf-8"))
    assert len(evaluation) > 40_000
    # Shorter runs of words are common phrases.
    assert shingles(" ".join(PASSAGES)) & evaluation == set()


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question["question"])
def test_no_question_is_answered(question: dict[str, str | list[str]]) -> None:
    """No passage holds the question, or an answer together with what the question is about."""
    assert question["answers"]
    for passage in PASSAGES:
        words = passage.casefold()
        assert str(question["question"]).casefold() not in words
        if len(words) < 5000 and all(key.casefold() in words for key in question["keys"]):
            assert not any(answer.casefold() in words for answer in question["answers"]), passage
