"""A tokenizer taken over from a GGUF file: BOS, the template, keys that are written as they were, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest

from d2q_edge.errors import D2QError
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.formats.gguf_writer import write_gguf
from d2q_edge.model.tokenizer import read_tokenizer, tokenizer_of
from tests.gguf_files import finish
from tests.model.tokenizer.families import FAMILIES
from tests.model.tokenizer.vocabulary_file import write_vocabulary


@pytest.mark.parametrize("name", FAMILIES)
def test_every_familys_tokenizer(tmp_path: Path, name: str) -> None:
    size = FAMILIES[name].vocab_size
    original = read_tokenizer(FAMILIES[name].write(tmp_path / name), {"eos_token_id": 2}, size)
    file = GGUFFile(write_vocabulary(tmp_path / "in.gguf", original))
    found = tokenizer_of(file, size)
    assert (found.bos, found.adds_bos, found.notes) == (original.bos, original.adds_bos, ())
    assert (found.tokens, found.types, found.chat_template) == (original.tokens, original.types, original.chat_template)
    assert {role: found.special_ids.get(role) for role in original.special_ids} == original.special_ids
    assert found.add_special.items() <= original.add_special.items()
    write_gguf(tmp_path / "out.gguf", "llama", [], found.add_to)
    assert list(GGUFFile(tmp_path / "out.gguf").packed.items()) == list(file.packed.items())


def test_keys_that_nobody_knows_stay(tmp_path: Path) -> None:
    """Kinds of numbers, texts that aren't UTF-8, and several templates included; other keys are not the tokenizer's."""
    source = gguf.GGUFWriter(tmp_path / "in.gguf", "llama")
    source.add_tokenizer_model("gpt2")
    source.add_token_list([b"a", b"\xff\xfe", b"c"])
    source.add_chat_template([{"name": "default", "template": "x"}, {"name": "tool_use", "template": "y"}])
    source.add_uint8("tokenizer.ggml.some_level", 7)
    source.add_array("tokenizer.ggml.some_scores", [0.5, 1.5])
    source.add_eot_token_id(2)
    source.add_string("other.key", "z")
    finish(source)
    file = GGUFFile(tmp_path / "in.gguf")
    tokenizer = tokenizer_of(file, 3)
    assert tokenizer.bos is None
    assert tokenizer.chat_template == [{"name": "default", "template": "x"}, {"name": "tool_use", "template": "y"}]
    write_gguf(tmp_path / "out.gguf", "llama", [], tokenizer.add_to)
    written = GGUFFile(tmp_path / "out.gguf").packed
    assert written == {key: value for key, value in file.packed.items() if key != "other.key"}
    assert {
        "tokenizer.chat_template.tool_use",
        "tokenizer.chat_templates",
        "tokenizer.ggml.eot_token_id",
    } < written.keys()
    assert b"\xff\xfe" in bytes(written["tokenizer.ggml.tokens"][1])


@pytest.mark.parametrize(
    ("keys", "pattern"),
    [
        ({}, "has no tokenizer; only files with BPE"),
        ({"model": "t5"}, r"has a tokenizer of the kind 't5'; only files with BPE \(gpt2, llama, gemma4\)"),
        ({"model": "gpt2", "pre": "newest"}, "pre-tokenizer 'newest', which the llama.cpp of d2q-edge doesn't know"),
        ({"model": "gpt2"}, "tokens aren't 2, one for each embedding"),
        ({"model": "gpt2", "tokens": ["a", "b", "c"]}, "tokens aren't 2, one for each embedding"),
        ({"model": "llama", "tokens": ["a", "b"], "token_type": ["x", "y"]}, "token types aren't 2"),
    ],
)
def test_refusals(tmp_path: Path, keys: dict[str, Any], pattern: str) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    for key, value in keys.items():
        (writer.add_string if isinstance(value, str) else writer.add_array)(f"tokenizer.ggml.{key}", value)
    finish(writer)
    with pytest.raises(D2QError, match=pattern):
        tokenizer_of(GGUFFile(tmp_path / "x.gguf"), 2)
