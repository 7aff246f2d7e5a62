"""Token windows: how texts are cut, and which windows are chosen for calibration and for validation."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from d2q_edge.calibration.chat_template import ChatTemplate
from d2q_edge.calibration.mixture import Part, load_parts
from d2q_edge.calibration.text import Text
from d2q_edge.calibration.windows import HELD_OUT, VALIDATION_TOKENS, Windows, split_windows
from d2q_edge.errors import D2QError
from tests.checkpoints import EXAMPLE

BOS = 4093
PLAIN = ChatTemplate(None, {})


class Letters:
    """A tokenizer with one token per character; records how it was called."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        assert options == {"add_special_tokens": False, "verbose": False}
        return {"input_ids": [ord(letter) for letter in text]}


def split(*texts: str, tokens: int, context: int = 10, seed: int = 0, bos: int | None = None) -> Windows:
    parts = [Part(Text((text,), "text", "")) for text in texts]
    return split_windows(Letters(), parts, PLAIN, tokens, context, seed, bos)


def letters(count: int, first: int = 1000) -> str:
    return "".join(chr(first + i) for i in range(count))


def test_bundled_calibration_suffices_for_the_default() -> None:
    found = split_windows(AutoTokenizer.from_pretrained(EXAMPLE), load_parts("builtin"), PLAIN, 65536, 512, 0, None)
    assert found.calibration.shape == (128, 512)
    assert found.validation.shape == (8, 512)
    assert found.calibration.dtype == np.int64


class TestCalibrationWindows:
    TEXT = letters(1005)

    def test_nine_tenths_of_a_short_text(self) -> None:
        found = split(self.TEXT, tokens=5000)
        assert found.calibration.shape == (90, 10)
        assert found.available == 1005
        both = np.concatenate([found.calibration, found.validation])
        assert sorted(both.ravel().tolist()) == list(range(1000, 2000)), "the last five tokens don't fill a window"

    def test_choice_keeps_windows_whole_and_in_order(self) -> None:
        found = split(self.TEXT, tokens=300).calibration
        assert found.shape == (30, 10)
        starts = found[:, 0] - 1000
        assert (starts % 10 == 0).all()
        assert all(a < b for a, b in pairwise(starts.tolist()))
        assert (found == found[:, :1] + np.arange(10)).all()

    def test_choice_follows_the_seed(self) -> None:
        first = split(self.TEXT, tokens=300, seed=1).calibration
        assert np.array_equal(first, split(self.TEXT, tokens=300, seed=1).calibration)
        assert not np.array_equal(first, split(self.TEXT, tokens=300, seed=2).calibration)

    def test_choice_is_even(self) -> None:
        starts = split(self.TEXT, tokens=300).calibration[:, 0] - 1000
        assert np.diff(starts).max() <= 80
        assert starts.min() < 50
        assert starts.max() > 950

    def test_bos_replaces_the_first_token_of_each_window(self) -> None:
        plain, with_bos = split(self.TEXT, tokens=300), split(self.TEXT, tokens=300, bos=BOS)
        for without, windows in ((plain.calibration, with_bos.calibration), (plain.validation, with_bos.validation)):
            assert (windows[:, 0] == BOS).all()
            assert np.array_equal(windows[:, 1:], without[:, 1:])

    def test_fewer_tokens_than_a_window_give_one(self) -> None:
        assert split(self.TEXT, tokens=3).calibration.shape == (1, 10)


class TestSeveralTexts:
    def test_weights_share_the_tokens_out(self) -> None:
        parts = [Part(Text((letters(2000),), "a", ""), 1.0), Part(Text((letters(2000, 5000),), "b", ""), 3.0)]
        found = split_windows(Letters(), parts, PLAIN, 400, 10, 0, None)
        assert found.counts == (10, 30)
        assert ((found.calibration[:, 0] >= 5000).sum(), len(found.calibration)) == (30, 40)
        assert 0 < (found.validation[:, 0] < 5000).sum() < len(found.validation)

    def test_what_one_lacks_the_others_give(self) -> None:
        found = split(letters(105), letters(2000, 5000), tokens=1000)
        assert found.counts == (9, 91)

    def test_a_text_of_one_window_beside_others(self) -> None:
        found = split(letters(10), letters(2000, 5000), tokens=300)
        assert found.counts == (1, 29)
        assert (found.validation >= 5000).all()

    def test_conversations_are_rendered(self) -> None:
        conversation = {"messages": [{"role": "user", "content": "abcdef"}]}
        template = ChatTemplate("{{ messages[0].content }}", {})
        parts = [Part(Text((conversation,) * 10, "a", ""))]
        found = split_windows(Letters(), parts, template, 60, 6, 0, None)
        assert {"".join(map(chr, row)) for row in found.calibration.tolist()} == {"abcdef"}
        broken = split_windows(Letters(), parts, ChatTemplate("{{ 1 / 0 }}", {}), 60, 6, 0, None)
        assert "division by zero" in broken.notes[0]


class TestTooShort:
    def test_two_windows_are_the_least(self) -> None:
        found = split(letters(20), tokens=300)
        assert (len(found.calibration), len(found.validation)) == (1, 1)

    def test_one_text(self) -> None:
        with pytest.raises(D2QError, match="text has 19 tokens, but it takes 20, a window to calibrate on and one for"):
            split(letters(19), tokens=300)

    def test_one_of_several(self) -> None:
        with pytest.raises(D2QError, match="text has 9 tokens, but it takes 10, one window"):
            split(letters(200), letters(9), tokens=300)

    def test_several_without_validation(self) -> None:
        with pytest.raises(D2QError, match="no text has a second window of 10 tokens, for validation"):
            split(letters(19), letters(19), tokens=300)


class TestValidationWindows:
    def test_are_never_calibrated_on(self) -> None:
        """Neither with more tokens, as refinement takes them, nor with another seed."""
        text = letters(512 * 100, 32)
        found = [
            split(text, tokens=tokens, context=512, seed=seed, bos=7) for tokens in (512, 10**9) for seed in (0, 1)
        ]
        for each in found:
            assert np.array_equal(each.validation, found[0].validation)
            assert not set(each.calibration[:, 1]) & set(found[0].validation[:, 1])
        held = found[0].validation
        assert held.shape == (VALIDATION_TOKENS // 512, 512)
        assert held[-1, 1] - held[0, 1] > 512 * 60, "from everywhere in the text"

    def test_are_a_tenth_at_most(self) -> None:
        text = letters(64 * 40)
        assert split(text, tokens=1, context=64).validation.shape == (40 // HELD_OUT, 64)
        assert split(text, tokens=1, context=1280).validation.shape == (1, 1280)
