"""Added tokens for which it matters in transformers what stands beside them: noted, unless words would be split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from d2q_edge.errors import D2QError
from d2q_edge.export.tokenizer_check import verify
from d2q_edge.model.tokenizer import Tokenizer, read_tokenizer
from tests.availability import require_runtime
from tests.model.tokenizer.families import FAMILIES
from tests.model.tokenizer.tokenizers import add_tokens, byte_level, sentencepiece_json, sentencepiece_model, write
from tests.model.tokenizer.vocabulary_file import write_vocabulary

BESIDE = (
    "the original tokenizer takes white space beside such tokens in, or finds them between words only (lstrip, rstrip, "
    "single_word), but llama.cpp may not; text beside them can differ"
)


def make(directory: Path, tokens: dict[str, dict[str, Any]], *, sentencepiece: bool = False) -> Tokenizer:
    if sentencepiece:
        family = FAMILIES["llama2"]
        content = sentencepiece_json(sentencepiece_model(), family.normalizer, family.pre_tokenizer)
        tokens = {"<unk>": {}, "<s>": {}, "</s>": {}, **tokens}
    else:
        content = json.loads(byte_level("qwen2"))
    add_tokens(content, tokens)
    write(directory, {}, {"tokenizer_class": "PreTrainedTokenizerFast"}, content)
    return read_tokenizer(directory, {}, 624)


def check(directory: Path, tokenizer: Tokenizer) -> None:
    require_runtime()
    verify(write_vocabulary(directory / "ours.gguf", tokenizer), directory, tokenizer)


@pytest.mark.parametrize("sentencepiece", [False, True])
@pytest.mark.parametrize(
    ("option", "kind"),
    [
        ("lstrip", "white space around special tokens"),
        ("rstrip", "white space around special tokens"),
        ("single_word", "special tokens within words"),
    ],
)
def test_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, kind: str, sentencepiece: bool) -> None:
    tokens = {"<|plain|>": {}, "<|odd|>": {option: True}, "[odd]": {option: True, "special": False}}
    tokenizer = make(tmp_path / "model", tokens, sentencepiece=sentencepiece)
    assert tokenizer.notes == (f"'<|odd|>', '[odd]': {BESIDE}",)
    check(tmp_path / "model", tokenizer)
    assert kind in capsys.readouterr().err


def test_many_are_counted(tmp_path: Path) -> None:
    tokenizer = make(tmp_path / "model", {f"<|{i}|>": {"rstrip": True} for i in range(7)})
    assert tokenizer.notes == (f"'<|0|>', '<|1|>', '<|2|>', '<|3|>', '<|4|>' and 2 more: {BESIDE}",)


@pytest.mark.parametrize("options", [{"lstrip": False}, {"single_word": False}, {}])
def test_nothing_to_note(tmp_path: Path, options: dict[str, bool]) -> None:
    tokenizer = make(tmp_path / "model", {"<|even|>": options})
    assert tokenizer.notes == () and tokenizer.gaps == {"decomposed"}
    check(tmp_path / "model", tokenizer)


def test_options_that_only_tokenizer_config_has(tmp_path: Path) -> None:
    make(tmp_path / "model", {"<|odd|>": {}})
    path = tmp_path / "model" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["added_tokens_decoder"]["600"]["rstrip"] = True
    path.write_text(json.dumps(settings))
    (tmp_path / "model" / "added_tokens.json").write_text('{"<|odd|>": 600}')
    assert read_tokenizer(tmp_path / "model", {}, 624).beside == ("<|odd|>",)


def test_a_word_is_refused(tmp_path: Path) -> None:
    """llama.cpp would find it inside of other words, which is more than a difference beside special tokens."""
    tokenizer = make(tmp_path / "model", {"he": {"single_word": True, "special": False}})
    with pytest.raises(D2QError, match=r"llama.cpp would tokenize"):
        check(tmp_path / "model", tokenizer)
