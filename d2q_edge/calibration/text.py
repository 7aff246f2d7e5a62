"""Read texts and conversations to calibrate on and to measure on: the bundled ones, or files.

A .jsonl file holds conversations, one {"messages": [...]} a line, as chat models are trained on. Any other file is
text.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from d2q_edge.calibration.chat_template import ChatTemplate
from d2q_edge.errors import D2QError

BUILTIN = "builtin"
DATA = Path(__file__).parents[1] / "data"
PROSE = DATA / "calibration" / "prose.txt"
EVALUATION = DATA / "evaluation.txt"
MIXTURE = ("prose.txt", "encyclopedia.txt", "documentation.txt", "code.txt", "mathematics.txt", "languages.txt",
           "dialogues.jsonl")  # fmt: skip
"""The files of data/calibration, whose passages alternate in the bundled calibration text (data/README.md)."""
SEPARATOR = "\n\n\n"
"""Two blank lines stand between the passages of a bundled text."""

Conversation: TypeAlias = Mapping[str, Any]
"""A conversation: "messages", and whatever else is for the chat template, such as "tools"."""


@dataclass(frozen=True)
class Text:
    """A text.

    Attributes:
        passages: pieces of text, and conversations, in order.
        source: where it came from: a file's name, or "builtin".
        sha256: of the UTF-8 bytes that it was read from.
    """

    passages: tuple[str | Conversation, ...]
    source: str
    sha256: str

    @property
    def has_conversations(self) -> bool:
        """Return whether any passage is a conversation, so that special tokens are to be read as such."""
        return any(not isinstance(passage, str) for passage in self.passages)

    def render(self, template: ChatTemplate) -> str:
        """Return all passages as one text, conversations as the model's chat template writes them."""
        return "".join(passage if isinstance(passage, str) else template.render(passage) for passage in self.passages)


def load_evaluation(where: str) -> Text:
    """Read the bundled evaluation text if `where` is "builtin", else the file `where`; errors as `load_calibration`."""
    return _read(EVALUATION, BUILTIN) if where == BUILTIN else _read(Path(where))


def load_calibration(where: str) -> Text:
    """Read the bundled calibration text, a mixture, if `where` is "builtin", else the file `where`.

    Raises:
        D2QError: the file can't be read, isn't UTF-8, is empty, or a line of a .jsonl file is no conversation.
    """
    if where != BUILTIN:
        return _read(Path(where))
    parts = [_read(DATA / "calibration" / name) for name in MIXTURE]
    digest = hashlib.sha256("".join(part.sha256 for part in parts).encode()).hexdigest()
    return Text(_interleave([_split(part) for part in parts]), BUILTIN, digest)


def _split(text: Text) -> list[str | Conversation]:
    """Split a bundled text at its blank lines; conversations stay whole."""
    passages: list[str | Conversation] = []
    for passage in text.passages:
        passages += (
            [passage] if not isinstance(passage, str) else [p + SEPARATOR for p in passage.strip().split(SEPARATOR)]
        )
    return passages


def _interleave(parts: list[list[str | Conversation]]) -> tuple[str | Conversation, ...]:
    """Merge lists of passages, so that every stretch of the result has of each part what the whole has."""
    placed = []
    for part in parts:
        lengths = [len(passage if isinstance(passage, str) else json.dumps(passage)) for passage in part]
        begin = 0
        for passage, length in zip(part, lengths, strict=True):
            placed.append(((begin + length / 2) / sum(lengths), passage))
            begin += length
    return tuple(passage for _, passage in sorted(placed, key=lambda entry: entry[0]))


def _read(path: Path, source: str | None = None) -> Text:
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise D2QError(f"can't read the text {path} ({error.strerror}); give a readable UTF-8 text file") from error
    except UnicodeDecodeError as error:
        raise D2QError(f"the text {path} is not UTF-8 (byte {error.start}); convert it or give another file") from error
    if not content.strip():
        raise D2QError(f"the text {path} is empty; give a file with some text")
    passages = _conversations(path, content) if path.suffix == ".jsonl" else (content,)
    return Text(passages, source or path.name, hashlib.sha256(content.encode()).hexdigest())


def _conversations(path: Path, content: str) -> tuple[Conversation, ...]:
    # Not splitlines(), which also splits at characters that JSON has inside of texts.
    lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    return tuple(_conversation(path, number, line) for number, line in lines)


def _conversation(path: Path, number: int, line: str) -> Conversation:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise D2QError(f"line {number} of {path} isn't JSON ({error}); a .jsonl file has one object a line") from error
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
        raise D2QError(
            f'line {number} of {path} isn\'t a conversation; each must be {{"messages": [{{"role": "user", "content": '
            '"..."}, ...]}'
        )
    return dict(value)


def _is_message(message: object) -> bool:
    """Return whether a message has a role, and text, parts of content, or calls of tools."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    return isinstance(message.get("content"), (str, list)) or isinstance(message.get("tool_calls"), list)
