"""Test published vocabularies, taken from llama.cpp's own test files and converted back to tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from transformers.tokenization_utils_base import generate_merges

from d2q_edge.export.tokenizer_check import verify
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.model.tokenizer import Tokenizer, read_tokenizer
from tests.availability import require_runtime
from tests.model.tokenizer.families import FAMILIES, LEGACY
from tests.model.tokenizer.tokenizers import BYTE_LEVEL, NORMALIZED, Json, bos_template, write
from tests.model.tokenizer.vocabulary_file import write_vocabulary

pytestmark = pytest.mark.slow
NORMAL, UNKNOWN, CONTROL, BYTE = (
    gguf.TokenType.NORMAL,
    gguf.TokenType.UNKNOWN,
    gguf.TokenType.CONTROL,
    gguf.TokenType.BYTE,
)
CONFIG = {"model_type": "llama"}


class Published:
    """One of models/ggml-vocab-*.gguf."""

    def __init__(self, tree: Path, name: str) -> None:
        self.kv: dict[str, Any] = GGUFFile(tree / f"vendor/llama.cpp/models/ggml-vocab-{name}.gguf").kv
        self.tokens: list[str] = list(self.kv["tokenizer.ggml.tokens"])
        self.types = [int(kind) for kind in self.kv["tokenizer.ggml.token_type"]]
        # Padding was once called user-defined, or unknown.
        self.padding = {i for i, token in enumerate(self.tokens) if token == f"[PAD{i}]"}

    def content(self, model: Json, **parts: Any) -> Json:
        """Return a tokenizer.json with this vocabulary and the given parts."""
        vocab = {token: i for i, token in enumerate(self.tokens) if i not in self.padding}
        added = [
            {"id": i, "content": token, "special": self.types[i] in (CONTROL, UNKNOWN), "normalized": False}
            | {"single_word": False, "lstrip": False, "rstrip": False}
            for i, token in enumerate(self.tokens)
            if i not in self.padding and (self.types[i] not in (NORMAL, BYTE))
        ]
        content: Json = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **parts}
        return {**content, "model": {"type": "BPE", "vocab": vocab, **model}}

    def merges(self) -> list[list[str]]:
        """Return the merges as pairs; a token may begin with the space that is also the separator."""
        return [
            [merge[: merge.index(" ", 1)], merge[merge.index(" ", 1) + 1 :]]
            for merge in self.kv["tokenizer.ggml.merges"]
        ]


def check(directory: Path, published: Published, content: Json) -> Tokenizer:
    """Require the published tokens, and the same ids in llama.cpp as in transformers."""
    write(directory, CONFIG, {"tokenizer_class": "PreTrainedTokenizerFast"}, content)
    tokenizer = read_tokenizer(directory, CONFIG, len(published.tokens))
    assert tokenizer.tokens == published.tokens
    differing = {i for i, kind in enumerate(published.types) if kind != tokenizer.types[i]} - published.padding
    # <unk> is an added token today; Gemma 4 has a special token that llama.cpp's converter wants to be visible.
    assert {published.tokens[i] for i in differing} <= {"<unk>", '<|"|>'}
    require_runtime()
    verify(write_vocabulary(directory / "ours.gguf", tokenizer), directory, tokenizer)
    return tokenizer


@pytest.mark.parametrize(
    ("name", "family", "pre"),
    [
        ("llama-bpe", "llama3", "llama-bpe"),
        ("qwen2", "qwen2", "qwen2"),
        ("starcoder", "smollm2", "smollm"),
    ],
)
def test_byte_level(pristine_tree: Path, tmp_path: Path, name: str, family: str, pre: str) -> None:
    published = Published(pristine_tree, name)
    split = BYTE_LEVEL[family]()
    content = published.content(
        {"merges": published.merges(), "ignore_merges": pre == "llama-bpe"},
        normalizer={"type": "NFC"} if family in NORMALIZED else None,
        pre_tokenizer=json.loads(split.__getstate__().decode()),
        post_processor=None,
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    )
    tokenizer = check(tmp_path / "model", published, content)
    assert tokenizer.pre == pre
    assert tokenizer.merges == list(published.kv["tokenizer.ggml.merges"])


def test_vocab_and_merges(pristine_tree: Path, tmp_path: Path) -> None:
    """Qwen2's vocabulary as the files of its Python tokenizer."""
    published = Published(pristine_tree, "qwen2")
    content = published.content({})
    added = {token["content"] for token in content["added_tokens"]}
    vocab = {text: i for text, i in content["model"]["vocab"].items() if text not in added}
    directory = write(tmp_path / "model", CONFIG, {"tokenizer_class": "Qwen2Tokenizer"}, content)
    (directory / "tokenizer.json").unlink()
    (directory / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    merges = [" ".join(merge) for merge in published.merges()]
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    tokenizer = read_tokenizer(directory, CONFIG, len(published.tokens))
    assert (tokenizer.pre, tokenizer.tokens) == ("qwen2", published.tokens)
    assert tokenizer.merges == list(published.kv["tokenizer.ggml.merges"])
    require_runtime()
    verify(write_vocabulary(directory / "ours.gguf", tokenizer), directory, tokenizer)


@pytest.mark.parametrize("name", ["llama-spm", "phi-3"])
def test_scores_from_merges(pristine_tree: Path, tmp_path: Path, name: str) -> None:
    """The scores from transformers' merges have the order of the scores in Llama 2's tokenizer.model."""
    published = Published(pristine_tree, name)
    scores = dict(zip(published.tokens, map(float, published.kv["tokenizer.ggml.scores"]), strict=True))
    vocab = {token: i for i, token in enumerate(published.tokens) if published.types[i] in (NORMAL, BYTE)}
    merges = generate_merges(vocab, {token: scores[token] for token in vocab})
    model = {"merges": merges, "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    parts = {"normalizer": LEGACY, "pre_tokenizer": None, "decoder": None, "post_processor": None}
    content = published.content(model, **parts)
    content["post_processor"] = bos_template(content, "<s>")
    tokenizer = check(tmp_path / "model", published, content)
    assert tokenizer.scores is not None
    merged = [i for i, token in enumerate(published.tokens) if published.types[i] == NORMAL and len(token) > 1]
    ours, theirs = np.array(tokenizer.scores)[merged], np.array(list(scores.values()))[merged]
    assert len(set(ours)) == len(ours)
    assert np.all(np.diff(theirs[np.argsort(-ours)]) <= 0), "Llama's runs of spaces have all the same score"


def test_gemma_without_a_sentencepiece_model(pristine_tree: Path, tmp_path: Path) -> None:
    """Gemma 4's vocabulary, whose tokenizer.json has the structure of Gemma 3's; 514,906 merges."""
    published = Published(pristine_tree, "gemma-4")
    model = {"merges": published.merges(), "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    family = FAMILIES["gemma3"]
    parts = {"normalizer": family.normalizer, "pre_tokenizer": family.pre_tokenizer, "decoder": None}
    content = published.content(model, **parts, post_processor=None)
    content["post_processor"] = bos_template(content, "<bos>")
    check(tmp_path / "model", published, content)
