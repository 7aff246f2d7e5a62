"""Gemma 4's tokenizer against llama.cpp's converter's rules, and in llama.cpp against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from d2q_edge.errors import D2QError
from d2q_edge.export.tokenizer_check import verify
from d2q_edge.formats.gguf_writer import write_gguf
from d2q_edge.model.tokenizer import Tokenizer, read_tokenizer
from tests.availability import require_runtime
from tests.model.tokenizer.families import write_gemma4

CONFIG = {"model_type": "gemma4_text"}


def change(directory: Path, **entries: Any) -> None:
    file = directory / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **entries}), "utf-8")


def written(tokenizer: Tokenizer, path: Path) -> Path:
    write_gguf(path, "gemma4", [], tokenizer.add_to)
    return path


def test_types_of_tokens(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(write_gemma4(tmp_path / "model", 700), CONFIG, 700)
    kinds = dict(zip(tokenizer.tokens, tokenizer.types, strict=True))
    wanted = {"<s>": "CONTROL", "<0x0A>": "BYTE", "<|tool_call>": "USER_DEFINED", "\u2581unused699": "NORMAL"}
    assert {text: gguf.TokenType(kinds[text]).name for text in wanted} == wanted
    assert (tokenizer.model, tokenizer.adds_bos, tokenizer.bos) == ("gemma4", True, tokenizer.tokens.index("<s>"))
    assert set(tokenizer.scores or ()) == {-1000.0}


def test_text_is_tokenized_as_by_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require_runtime()
    directory = write_gemma4(tmp_path / "model", 700)
    tokenizer = read_tokenizer(directory, CONFIG, 700)
    verify(written(tokenizer, tmp_path / "out.gguf"), directory, tokenizer)
    assert capsys.readouterr().err == ""


def test_a_merge_less_is_noticed(tmp_path: Path) -> None:
    """It is the list of merges that decides, not the scores."""
    require_runtime()
    directory = write_gemma4(tmp_path / "model", 700)
    tokenizer = read_tokenizer(directory, CONFIG, 700)
    model = json.loads((directory / "tokenizer.json").read_text("utf-8"))["model"]
    change(directory, model={**model, "merges": model["merges"][1:]})
    with pytest.raises(D2QError, match="would tokenize"):
        verify(written(tokenizer, tmp_path / "out.gguf"), directory, tokenizer)


@pytest.mark.parametrize(
    ("entries", "pattern"),
    [
        ({"normalizer": {"type": "NFC"}}, "normalizes or splits text in another way than Gemma 4's"),
        ({"normalizer": None}, "normalizes or splits text in another way"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "normalizes or splits text in another way"),
    ],
)
def test_refusals(tmp_path: Path, entries: dict[str, Any], pattern: str) -> None:
    directory = write_gemma4(tmp_path / "model", 700)
    change(directory, **entries)
    with pytest.raises(D2QError, match=pattern):
        read_tokenizer(directory, CONFIG, 700)
