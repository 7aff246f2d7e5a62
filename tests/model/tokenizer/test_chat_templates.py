"""Several chat templates without one that is named default."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
from transformers import PreTrainedTokenizerFast

from d2q_edge.model.tokenizer import Tokenizer, read_tokenizer
from tests.model.tokenizer.families import FAMILIES
from tests.model.tokenizer.vocabulary_file import tokenizer_keys, write_vocabulary

TEMPLATE, NAMES = "tokenizer.chat_template", "tokenizer.chat_templates"


def make(directory: Path, *names: str) -> Tokenizer:
    FAMILIES["qwen2"].write(directory)
    path = directory / "tokenizer_config.json"
    templates = [{"name": name, "template": f"{{# {name} #}}"} for name in names]
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": templates}))
    return read_tokenizer(directory, {}, 624)


@pytest.mark.parametrize(
    ("names", "default"),
    [(("rag",), "rag"), (("rag", "tool_use"), "tool_use"), (("rag", "other"), "rag"), (("rag", "default"), None)],
)
def test_one_becomes_the_default(tmp_path: Path, names: tuple[str, ...], default: str | None) -> None:
    tokenizer = make(tmp_path / "model", *names)
    keys = dict(tokenizer_keys(write_vocabulary(tmp_path / "ours.gguf", tokenizer)))
    assert keys[TEMPLATE] == f"{{# {default or 'default'} #}}"
    assert list(keys[NAMES]) == sorted({*names} - {"default"})
    assert all(keys[f"{TEMPLATE}.{name}"] == f"{{# {name} #}}" for name in keys[NAMES])
    note = f"none of the chat templates is the default one; the file has {default!r} as such"
    assert tokenizer.notes == ((note,) if default else ())
    if default:
        original = PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
        with pytest.raises(ValueError, match="no default specified"):
            original.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)


def test_no_template(tmp_path: Path) -> None:
    tokenizer = make(tmp_path / "model")
    assert tokenizer.notes == ()
    assert not [key for key, _ in tokenizer_keys(write_vocabulary(tmp_path / "ours.gguf", tokenizer)) if "chat" in key]


def test_names_come_in_a_fixed_order(tmp_path: Path) -> None:
    names = [f"name{i}" for i in range(8)]
    tokenizer = make(tmp_path / "model", "default", *names[::-1])
    assert dict(tokenizer_keys(write_vocabulary(tmp_path / "ours.gguf", tokenizer)))[NAMES] == names


def test_named_ones_are_written_as_by_the_stock_converter(tmp_path: Path) -> None:
    """Which has gguf-py write them, and no default, so that llama.cpp has none."""
    tokenizer = make(tmp_path / "model", "rag", "tool_use")
    ours = {
        key: value for key, value in tokenizer_keys(write_vocabulary(tmp_path / "o.gguf", tokenizer)) if "chat" in key
    }
    writer = gguf.GGUFWriter(tmp_path / "unused", "llama")
    writer.add_chat_template(tokenizer.chat_template)
    theirs = {key: value.value for key, value in writer.kv_data[0].items() if "chat" in key}
    assert ours.pop(TEMPLATE) == theirs[f"{TEMPLATE}.tool_use"]
    assert ours.pop(NAMES) == sorted(theirs.pop(NAMES))
    assert ours == theirs
