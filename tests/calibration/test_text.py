"""Calibration text: the bundled texts, bad files, and how windows are cut and chosen."""

import hashlib
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from d2q_edge.calibration.text import BUILTIN, Text, load_text
from d2q_edge.calibration.windows import VALIDATION_TOKENS, split_windows, token_windows
from d2q_edge.errors import D2QError
from tests.checkpoints import EXAMPLE

BOS = 4093


class Letters:
    """A tokenizer with one token per character; records how it was called."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        assert options == {"add_special_tokens": False, "verbose": False}
        return {"input_ids": [ord(letter) for letter in text]}


def windows(text: str, tokens: int, *, context: int = 10, seed: int = 0, bos: int | None = None) -> Any:
    return token_windows(Letters(), Text(text, "", ""), tokens, context, seed, bos)


def shingles(text: str, words: int = 10) -> set[tuple[str, ...]]:
    found = re.findall(r"\w+", text.lower())
    return set(zip(*(found[i:] for i in range(words)), strict=False))


class TestTexts:
    def test_bundled_texts_share_nothing(self) -> None:
        calibration, evaluation = (load_text("builtin", name).content for name in ("calibration", "evaluation"))
        assert len(calibration) > 200_000
        assert len(evaluation) > 200_000
        # Shorter runs of words are common phrases; there is one of 8 words.
        assert shingles(calibration) & shingles(evaluation) == set()

    @pytest.mark.parametrize("name", BUILTIN)
    def test_source_and_hash_of_bundled_texts(self, name: str) -> None:
        text = load_text("builtin", name)
        assert text.source == "builtin"
        assert text.sha256 == hashlib.sha256(BUILTIN[name].read_bytes()).hexdigest()

    def test_bundled_calibration_suffices_for_the_default(self) -> None:
        tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
        chosen = token_windows(tokenizer, load_text("builtin", "calibration"), 65536, 512, 0, None)
        assert chosen.shape == (128, 512)
        assert chosen.dtype == np.int64

    def test_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("Käse\n", encoding="utf-8")
        text = load_text(str(tmp_path / "a.txt"), "calibration")
        assert (text.content, text.source) == ("Käse\n", "a.txt")
        assert text.sha256 == hashlib.sha256("Käse\n".encode()).hexdigest()

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(D2QError, match=r"can't read the text .*none.txt \(No such file"):
            load_text(str(tmp_path / "none.txt"), "calibration")

    def test_directory(self, tmp_path: Path) -> None:
        with pytest.raises(D2QError, match=r"can't read the text .* \(Is a directory\)"):
            load_text(str(tmp_path), "calibration")

    def test_not_utf8(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes("abc Käse".encode("latin-1"))
        with pytest.raises(D2QError, match=r"is not UTF-8 \(byte 5\)"):
            load_text(str(tmp_path / "a.txt"), "calibration")

    @pytest.mark.parametrize("content", ["", " \n\t\n"])
    def test_empty(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "a.txt").write_text(content)
        with pytest.raises(D2QError, match=r"the text .*a.txt is empty"):
            load_text(str(tmp_path / "a.txt"), "calibration")


class TestWindows:
    TEXT = "".join(chr(1000 + i) for i in range(1005))

    def test_all_of_a_short_text(self) -> None:
        found = windows(self.TEXT, 5000)
        assert found.shape == (100, 10)
        assert found.ravel().tolist() == list(range(1000, 2000)), "the last five tokens don't fill a window"

    def test_choice_keeps_windows_whole_and_in_order(self) -> None:
        found = windows(self.TEXT, 300)
        assert found.shape == (30, 10)
        starts = found[:, 0] - 1000
        assert (starts % 10 == 0).all()
        assert all(a < b for a, b in pairwise(starts.tolist()))
        assert (found == found[:, :1] + np.arange(10)).all()

    def test_choice_follows_the_seed(self) -> None:
        first = windows(self.TEXT, 300, seed=1)
        assert np.array_equal(first, windows(self.TEXT, 300, seed=1))
        assert not np.array_equal(first, windows(self.TEXT, 300, seed=2))

    def test_choice_covers_the_text(self) -> None:
        starts = windows(self.TEXT, 300)[:, 0] - 1000
        assert starts.min() < 150
        assert starts.max() > 850

    def test_bos_replaces_the_first_token_of_each_window(self) -> None:
        plain, with_bos = windows(self.TEXT, 300), windows(self.TEXT, 300, bos=BOS)
        assert (with_bos[:, 0] == BOS).all()
        assert np.array_equal(with_bos[:, 1:], plain[:, 1:])

    def test_fewer_tokens_than_a_window_give_one(self) -> None:
        assert windows(self.TEXT, 3).shape == (1, 10)

    def test_text_of_exactly_one_window(self) -> None:
        assert windows("abcdefghij", 300).tolist() == [[ord(letter) for letter in "abcdefghij"]]

    def test_text_shorter_than_a_window(self) -> None:
        with pytest.raises(D2QError, match="the calibration text has 9 tokens, less than one window of 10"):
            windows("abcdefghi", 300)


class TestHeldBack:
    def split(self, text: str, tokens: int, **options: Any) -> tuple[Any, Any]:
        settings = {"context": 512, "seed": 0, "bos": None, **options}
        return split_windows(
            Letters(), Text(text, "", ""), tokens, settings["context"], settings["seed"], settings["bos"]
        )

    def test_is_not_calibrated_on(self) -> None:
        text = "".join(chr(32 + index) for index in range(512 * 40))
        chosen, held = self.split(text, 512 * 25, bos=7)
        assert np.array_equal(chosen, windows(text, 512 * 25, context=512, bos=7))
        assert held.shape == (VALIDATION_TOKENS // 512, 512)
        assert set(chosen[:, 0]) == set(held[:, 0]) == {7}
        assert not set(chosen[:, 1]) & set(held[:, 1])
        assert list(held[:, 1]) == sorted(set(held[:, 1]))
        assert held[-1, 1] - held[0, 1] > 512 * 20, "from everywhere in the text"

    def test_takes_what_is_left(self) -> None:
        text = "x" * (512 * 40)
        assert [len(self.split(text, 512 * count)[1]) for count in (1, 32, 33, 38, 39, 40, 99)] == [8, 8, 7, 2, 1, 0, 0]
        assert self.split(text, 64, context=64)[1].shape == (VALIDATION_TOKENS // 64, 64)
        assert self.split(text, 8192, context=8192)[1].shape == (1, 8192)
