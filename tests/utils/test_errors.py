"""How messages are shown on a terminal."""

import pytest

from d2q_edge.errors import MAX_LENGTH, D2QError, sentence


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("can't read grün.gguf: 100 % \U0001f999", "can't read grün.gguf: 100 % \U0001f999"),
        ("two\n\tlines\r\nof  it\n", "two lines of it"),
        ("a\x1b[2Jb\x00c\x7f\x9b\u202e", r"a\x1b[2Jb\x00c\x7f\x9b\u202e"),
        ("x\udcff\ud800", r"x\udcff\ud800"),
    ],
)
def test_sentence(message: str, shown: str) -> None:
    assert sentence(D2QError(message)) == shown
    shown.encode()


def test_long_message() -> None:
    """The beginning says what is wrong, and the end what to do."""
    shown = sentence(D2QError("what " + "x" * 100_000 + " do"))
    assert len(shown) == MAX_LENGTH
    assert shown.startswith("what xxx")
    assert shown.endswith("xxx do")
    assert sentence(D2QError("y" * MAX_LENGTH)) == "y" * MAX_LENGTH
