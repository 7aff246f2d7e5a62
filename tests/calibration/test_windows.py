"""Token windows: how a text is cut, and which windows are chosen for calibration and for validation."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from d2q_edge.calibration.text import Text, load_text
from d2q_edge.calibration.windows import VALIDATION_TOKENS, split_windows
from d2q_edge.errors import D2QError
from tests.checkpoints import EXAMPLE

BOS = 4093


class Letters:
    """A tokenizer with one token per character; records how it was called."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        assert options == {"add_special_tokens": False, "verbose": False}
        return {"input_ids": [ord(letter) for letter in text]}


def windows(text: str, tokens: int, *, context: int = 10, seed: int = 0, bos: int | None = None) -> Any:
    return split_windows(Letters(), Text(text, "", ""), tokens, context, seed, bos)[0]


def test_bundled_calibration_suffices_for_the_default() -> None:
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    chosen, _ = split_windows(tokenizer, load_text("builtin", "calibration"), 65536, 512, 0, None)
    assert chosen.shape == (128, 512)
    assert chosen.dtype == np.int64


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


class TestValidationWindows:
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
