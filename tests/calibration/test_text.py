"""Texts and conversations from files, and files that can't be used."""

import hashlib
import json
from pathlib import Path

import pytest

from d2q_edge.calibration.chat_template import ChatTemplate
from d2q_edge.calibration.text import EVALUATION, load_calibration, load_evaluation
from d2q_edge.errors import D2QError

PLAIN = ChatTemplate(None, {})
HELLO = {"messages": [{"role": "user", "content": "Grüß Gott!"}, {"role": "assistant", "content": "Servus."}]}


def test_bundled_texts() -> None:
    evaluation, calibration = load_evaluation("builtin"), load_calibration("builtin")
    assert evaluation.source == calibration.source == "builtin"
    assert evaluation.sha256 == hashlib.sha256(EVALUATION.read_bytes()).hexdigest()
    assert evaluation.render(PLAIN) == EVALUATION.read_text("utf-8")
    assert not evaluation.has_conversations
    assert calibration.has_conversations


def test_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Käse\n", encoding="utf-8")
    text = load_calibration(str(tmp_path / "a.txt"))
    assert (text.render(PLAIN), text.source) == ("Käse\n", "a.txt")
    assert text.sha256 == hashlib.sha256("Käse\n".encode()).hexdigest()


def test_conversations(tmp_path: Path) -> None:
    lines = [json.dumps(HELLO), "", json.dumps({**HELLO, "tools": []}, ensure_ascii=False)]
    # Splitting at U+2028, which JSON allows in a text, would break this line.
    lines.append('{"messages": [{"role": "user", "content": "one\u2028two"}]}')
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    text = load_evaluation(str(tmp_path / "a.jsonl"))
    assert text.has_conversations
    assert [dict(passage) if not isinstance(passage, str) else passage for passage in text.passages] == [
        HELLO,
        {**HELLO, "tools": []},
        {"messages": [{"role": "user", "content": "one\u2028two"}]},
    ]
    template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", {})
    once = "<user>Grüß Gott!<assistant>Servus."
    assert text.render(template) == once + once + "<user>one\u2028two"


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "3",
        '{"conversations": [{"from": "human", "value": "Hi"}]}',
        '{"messages": []}',
        '{"messages": "Hi"}',
        '{"messages": ["Hi"]}',
        '{"messages": [{"content": "Hi"}]}',
        '{"messages": [{"role": 1, "content": "Hi"}]}',
        '{"messages": [{"role": "user", "content": null}]}',
    ],
)
def test_no_conversation(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(HELLO)}\n{line}\n")
    with pytest.raises(D2QError, match=r'line 2 of .*a.jsonl isn\'t a conversation; each must be \{"messages"'):
        load_calibration(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("line", ['{"messages": [', "Once upon a time", "[" * 100_000])
def test_no_json(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(D2QError, match=r"line 1 of .*a.jsonl isn't JSON"):
        load_calibration(str(tmp_path / "a.jsonl"))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(D2QError, match=r"can't read the text .*none.txt \(No such file"):
        load_calibration(str(tmp_path / "none.txt"))


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(D2QError, match=r"can't read the text .* \(Is a directory\)"):
        load_evaluation(str(tmp_path))


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("abc Käse".encode("latin-1"))
    with pytest.raises(D2QError, match=r"is not UTF-8 \(byte 5\)"):
        load_calibration(str(tmp_path / "a.txt"))


@pytest.mark.parametrize("content", ["", " \n\t\n"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_empty(tmp_path: Path, content: str, name: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(D2QError, match=rf"the text .*{name} is empty"):
        load_calibration(str(tmp_path / name))
