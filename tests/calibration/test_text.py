"""Texts: the bundled ones, and files that can't be used."""

import hashlib
import re
from pathlib import Path

import pytest

from d2q_edge.calibration.text import BUILTIN, load_text
from d2q_edge.errors import D2QError


def shingles(text: str, words: int = 10) -> set[tuple[str, ...]]:
    found = re.findall(r"\w+", text.lower())
    return set(zip(*(found[i:] for i in range(words)), strict=False))


def test_bundled_texts_share_nothing() -> None:
    calibration, evaluation = (load_text("builtin", name).content for name in ("calibration", "evaluation"))
    assert len(calibration) > 200_000
    assert len(evaluation) > 200_000
    # Shorter runs of words are common phrases; there is one of 8 words.
    assert shingles(calibration) & shingles(evaluation) == set()


@pytest.mark.parametrize("name", BUILTIN)
def test_source_and_hash_of_bundled_texts(name: str) -> None:
    text = load_text("builtin", name)
    assert text.source == "builtin"
    assert text.sha256 == hashlib.sha256(BUILTIN[name].read_bytes()).hexdigest()


def test_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Käse\n", encoding="utf-8")
    text = load_text(str(tmp_path / "a.txt"), "calibration")
    assert (text.content, text.source) == ("Käse\n", "a.txt")
    assert text.sha256 == hashlib.sha256("Käse\n".encode()).hexdigest()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(D2QError, match=r"can't read the text .*none.txt \(No such file"):
        load_text(str(tmp_path / "none.txt"), "calibration")


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(D2QError, match=r"can't read the text .* \(Is a directory\)"):
        load_text(str(tmp_path), "calibration")


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("abc Käse".encode("latin-1"))
    with pytest.raises(D2QError, match=r"is not UTF-8 \(byte 5\)"):
        load_text(str(tmp_path / "a.txt"), "calibration")


@pytest.mark.parametrize("content", ["", " \n\t\n"])
def test_empty(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(D2QError, match=r"the text .*a.txt is empty"):
        load_text(str(tmp_path / "a.txt"), "calibration")
