"""The check of a written file: it finds whatever makes llama.cpp tokenize differently, and says so in one sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest

from d2q_edge.conversion import convert
from d2q_edge.errors import D2QError
from d2q_edge.export.model_file import check_tokenizer, export, model_tokenizer
from d2q_edge.export.tokenizer_check import PROBE, text_gaps, verify
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from d2q_edge.model.tokenizer import Tokenizer, read_tokenizer
from d2q_edge.options import Options
from tests.availability import require_runtime
from tests.checkpoints import EXAMPLE
from tests.model.tokenizer.families import FAMILIES
from tests.model.tokenizer.tokenizers import add_tokens, byte_level, write
from tests.model.tokenizer.vocabulary_file import write_vocabulary

Make = Callable[..., Path]
Change = Callable[[Tokenizer], Tokenizer]


def swapped(items: list[Any], first: int, second: int) -> list[Any]:
    items = list(items)
    items[first], items[second] = items[second], items[first]
    return items


def retyped(tokenizer: Tokenizer, token: str, kind: int) -> Tokenizer:
    types = list(tokenizer.types)
    types[tokenizer.tokens.index(token)] = kind
    return replace(tokenizer, types=types)


NORMAL = int(gguf.TokenType.NORMAL)
DAMAGE: list[tuple[str, Change]] = [
    ("qwen2", lambda t: replace(t, pre="gpt-2")),
    ("llama3", lambda t: replace(t, pre="qwen2")),
    ("phi4", lambda t: replace(t, pre="tekken")),
    ("smollm2", lambda t: replace(t, pre="gpt-2")),
    ("olmoe", lambda t: replace(t, pre="smollm")),
    ("qwen2", lambda t: replace(t, merges=t.merges[:20] + t.merges[60:])),
    ("qwen2", lambda t: replace(t, tokens=swapped(t.tokens, 70, 71))),
    ("llama3", lambda t: replace(t, add_special={"bos": False})),
    ("llama3", lambda t: replace(t, special_ids={**t.special_ids, "bos": 5})),
    ("qwen2", lambda t: replace(t, add_special={"bos": False, "eos": True})),
    ("qwen2", lambda t: retyped(t, "<|im_start|>", NORMAL)),
    ("olmoe", lambda t: retyped(t, "|||IP_ADDRESS|||", NORMAL)),
    ("llama2", lambda t: replace(t, scores=[-1000.0] * len(t.tokens))),
    ("llama2", lambda t: replace(t, space_prefix_setting=None, adds_space_prefix=False)),
    ("gemma3", lambda t: replace(t, adds_space_prefix=True)),
    ("gemma3", lambda t: retyped(t, "<start_of_turn>", NORMAL)),
    ("mistral", lambda t: retyped(t, "[INST]", NORMAL)),
]


@pytest.mark.parametrize(("family", "change"), DAMAGE)
def test_finds_what_is_wrong(tmp_path: Path, family: str, change: Change) -> None:
    require_runtime()
    directory = FAMILIES[family].write(tmp_path / family)
    tokenizer = read_tokenizer(directory, FAMILIES[family].config(), FAMILIES[family].vocab_size)
    damaged = change(tokenizer)
    assert damaged != tokenizer
    with pytest.raises(D2QError, match=r"llama.cpp would tokenize .* in another way than transformers: from token \d+"):
        verify(write_vocabulary(tmp_path / "out.gguf", damaged), directory, tokenizer)


def test_message_shows_the_first_difference(tmp_path: Path) -> None:
    require_runtime()
    directory = FAMILIES["smollm2"].write(tmp_path / "model")
    tokenizer = read_tokenizer(directory, {}, 624, "gpt-2")
    with pytest.raises(D2QError) as caught:
        verify(write_vocabulary(tmp_path / "out.gguf", tokenizer), directory, tokenizer)
    found = re.fullmatch(
        r"llama.cpp would tokenize (.+) in another way than transformers: from token (\d+) on it has (\[[\d, ]+\]) "
        r"\(.+\) where transformers has (\[[\d, ]+\]) \(.+\); the file was not written, .*--no-verify.*",
        str(caught.value),
    )
    assert found
    assert json.loads(found[3])[0] != json.loads(found[4])[0]


def test_without_a_runtime(tmp_path: Path, no_runtime: None, capsys: pytest.CaptureFixture[str]) -> None:
    export(EXAMPLE, tmp_path / "out.gguf", "q8_0")
    assert capsys.readouterr().err == (
        "the file's tokenizer was not compared with the model's: the runtime (a patched llama-cpp-python) is not "
        "installed: run `d2q-edge runtime install`\n"
    )
    checkpoint = Checkpoint.open(EXAMPLE)
    family = family_for(checkpoint.config)
    check_tokenizer(checkpoint, family, model_tokenizer(checkpoint, family))
    assert capsys.readouterr().err == ""


def test_without_sentencepiece(
    tmp_path: Path, without_package: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    require_runtime()
    directory = FAMILIES["llama2"].write(tmp_path / "model", keep=("model",))
    tokenizer = read_tokenizer(directory, {}, 624)
    without_package("sentencepiece")
    verify(tmp_path / "none.gguf", directory, tokenizer)
    assert "that takes SentencePiece (pip install 'd2q-edge[sentencepiece]')" in capsys.readouterr().err


def test_model_alone_is_compared_with_sentencepiece(tmp_path: Path) -> None:
    require_runtime()
    directory = FAMILIES["llama2"].write(tmp_path / "model", keep=("model",))
    tokenizer = read_tokenizer(directory, {}, 624)
    damaged = replace(tokenizer, scores=[-1000.0] * 624)
    with pytest.raises(D2QError, match="in another way than SentencePiece"):
        verify(write_vocabulary(tmp_path / "out.gguf", damaged), directory, tokenizer)


def test_qwens_ordinary_end_of_text(tmp_path: Path) -> None:
    """llama.cpp makes control tokens of some texts, such as </s>, which are words in Qwen's vocabulary."""
    require_runtime()
    content = json.loads(byte_level("qwen2"))
    vocab = content["model"]["vocab"]
    for text in ("</", "</s", "</s>"):
        vocab[text] = len(vocab)
    content["model"]["merges"] += [["<", "/"], ["</", "s"], ["</s", ">"]]
    add_tokens(content, {"<|im_start|>": {}})
    directory = write(tmp_path / "model", {}, {"tokenizer_class": "PreTrainedTokenizerFast"}, content)
    tokenizer = read_tokenizer(directory, {}, 624)
    verify(write_vocabulary(tmp_path / "out.gguf", tokenizer), directory, tokenizer)


def test_nothing_is_written(make_checkpoint: Make, tmp_path: Path) -> None:
    require_runtime()
    model, out = make_checkpoint("qwen2"), tmp_path / "out"
    out.mkdir()
    for attempt in (
        lambda: export(model, out / "out.gguf", "q8_0", pre_tokenizer="gpt-2"),
        lambda: convert(model, out / "out.gguf", Options(calibrate=False, pre_tokenizer="gpt-2")),
        lambda: convert(model, out / "out.gguf", Options(calibration_tokens=64, context=32, pre_tokenizer="gpt-2")),
    ):
        with pytest.raises(D2QError, match="would tokenize"):
            attempt()
        assert list(out.iterdir()) == [], "not even a work directory: it is found before the work"
    export(model, out / "out.gguf", "q8_0", pre_tokenizer="gpt-2", verify=False)
    convert(model, out / "out.gguf", Options(calibrate=False, pre_tokenizer="gpt-2"), force=True, verify=False)


def test_damaged_file(tmp_path: Path) -> None:
    require_runtime()
    (tmp_path / "out.gguf").write_bytes(b"GGUF")
    with pytest.raises(D2QError, match=r"llama.cpp can't load .*out.gguf"):
        verify(tmp_path / "out.gguf", EXAMPLE, read_tokenizer(EXAMPLE, {}, 4096))


@pytest.mark.parametrize(
    ("text", "gaps"),
    [
        ("plain text, École, МОСКВА no: М", {"camel"}),
        ("École élan Привет iPhone", set()),
        ("aÉ", {"camel"}),
        ("éA", {"camel"}),
        ("中A Ab", set()),
        ("cafe\u0301", {"decomposed", "marks"}),
        ("ไทย", set()),
        ("สวัสดี", {"marks"}),
        (" x", {"leading"}),
        ("\u2581x", {"leading"}),
        ("\nx", set()),
    ],
)
def test_gaps_of_a_text(text: str, gaps: set[str]) -> None:
    assert text_gaps(text) == gaps


def test_probe_has_texts_for_everyone() -> None:
    """Nothing in it is a control token to llama.cpp by its text alone, which would differ in any vocabulary with it."""
    texts = json.loads(PROBE.read_text("utf-8"))
    assert len([text for text in texts if not text_gaps(text)]) > 40
    assert not any(
        name in text for text in texts for name in ("</s>", "<|im_end|>", "<|endoftext|>", "<EOT>", "<|end|>")
    )
