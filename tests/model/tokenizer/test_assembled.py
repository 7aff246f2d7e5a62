"""Models with vocab.json and merges.txt in place of tokenizer.json: as with it, and as llama.cpp's converter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from d2q_edge.errors import D2QError
from d2q_edge.export.tokenizer_check import verify
from d2q_edge.model.tokenizer import Tokenizer, read_tokenizer
from d2q_edge.model.tokenizer.original import load_original
from d2q_edge.runtime.llama_model import LlamaVocabulary
from tests.availability import require_runtime
from tests.model.tokenizer.families import FAMILIES
from tests.model.tokenizer.texts import AWKWARD, CORPUS
from tests.model.tokenizer.vocabulary_file import convert_vocabularies, tokenizer_keys, write_vocabulary

CLASSES = {"qwen2": "Qwen2Tokenizer", "smollm2": "GPT2Tokenizer", "olmoe": "GPTNeoXTokenizer"}
PRE = {"qwen2": "qwen2", "smollm2": "gpt-2", "olmoe": "olmo"}


def split(directory: Path, name: str, *, listed: bool = True, **settings: Any) -> Path:
    """Write a family's tokenizer and replace tokenizer.json; `listed` for added tokens with their options."""
    FAMILIES[name].write(directory)
    content = json.loads((directory / "tokenizer.json").read_text("utf-8"))
    (directory / "tokenizer.json").unlink()
    (directory / "vocab.json").write_text(json.dumps(content["model"]["vocab"]), "utf-8")
    merges = [" ".join(merge) for merge in content["model"]["merges"]]
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    path = directory / "tokenizer_config.json"
    entries = {**json.loads(path.read_text()), "tokenizer_class": CLASSES.get(name), **settings}
    if not listed:
        del entries["added_tokens_decoder"]
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
        (directory / "added_tokens.json").write_text(json.dumps(added))
    path.write_text(json.dumps(entries))
    return directory


def read(directory: Path, name: str) -> Tokenizer:
    return read_tokenizer(directory, FAMILIES[name].config(), FAMILIES[name].vocab_size)


@pytest.mark.parametrize("listed", [True, False], ids=["added_tokens_decoder", "added_tokens.json"])
def test_as_with_a_tokenizer_json(tmp_path: Path, listed: bool) -> None:
    whole = read(FAMILIES["qwen2"].write(tmp_path / "whole"), "qwen2")
    parts = read(split(tmp_path / "parts", "qwen2", listed=listed), "qwen2")
    assert (parts.pre, parts.tokens, parts.types) == ("qwen2", whole.tokens, whole.types)
    assert (parts.merges, parts.gaps) == (whole.merges, whole.gaps)
    assert parts.special_ids == whole.special_ids


@pytest.mark.slow
def test_keys_like_stock(pristine_tree: Path, tmp_path: Path) -> None:
    """The converter takes special tokens from config.json only, and leaves out those of tokenizer_config.json."""
    directories = {name: split(tmp_path / name, name) for name in CLASSES}
    for name, directory in directories.items():
        family = FAMILIES[name]
        eos = 600 + list(family.added).index(family.settings["eos_token"])
        (directory / "config.json").write_text(json.dumps({**family.config(), "eos_token_id": eos}))
    jobs = {directory: PRE[name] for name, directory in directories.items()}
    files = convert_vocabularies(pristine_tree / "vendor/llama.cpp", jobs, tmp_path)
    for name, directory in directories.items():
        recorded = FAMILIES[name].architecture == "LlamaForCausalLM"
        file = write_vocabulary(tmp_path / "ours.gguf", read(directory, name), space_prefix=recorded)
        ours, theirs = dict(tokenizer_keys(file)), dict(tokenizer_keys(files[name]))
        assert {key: ours.get(key) for key in theirs} == theirs
        assert all(key.endswith("_token_id") for key in ours.keys() - theirs.keys())
        assert ours["tokenizer.ggml.pre"] == PRE[name]
        assert "tokenizer.ggml.eos_token_id" in ours


@pytest.mark.parametrize("name", CLASSES)
def test_same_ids_as_transformers(tmp_path: Path, name: str) -> None:
    require_runtime()
    directory = split(tmp_path / "model", name)
    tokenizer, original = read(directory, name), load_original(directory)
    file = write_vocabulary(tmp_path / "ours.gguf", tokenizer)
    verify(file, directory, tokenizer)
    with LlamaVocabulary(file) as vocabulary:
        for text in CORPUS:
            assert vocabulary.tokenize(text, read_special=True) == original.encode(text)
        differ = [text for text in AWKWARD if vocabulary.tokenize(text, read_special=True) != original.encode(text)]
    assert not differ or "decomposed" in tokenizer.gaps


def test_the_class_comes_from_config_json(tmp_path: Path) -> None:
    assert read(split(tmp_path / "model", "qwen2", tokenizer_class=None), "qwen2").pre == "qwen2"


def test_no_code_of_the_model_is_run(tmp_path: Path) -> None:
    remote = {"AutoTokenizer": ["evil.Evil", None]}
    directory = split(tmp_path / "model", "qwen2", tokenizer_class="Evil", auto_map=remote)
    (directory / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    try:
        read(directory, "qwen2")
    except D2QError as error:
        assert "transformers can't load" in str(error)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "settings", "pattern"),
    [
        ("llama3", {"tokenizer_class": "LlamaTokenizer"}, "transformers' LlamaTokenizer makes no byte-level tokeni"),
        ("llama3", {"tokenizer_class": "CTRLTokenizer"}, "transformers' CTRLTokenizer makes no .*; add the model's"),
        ("llama3", {"tokenizer_class": None}, "can't load the tokenizer of .* correct the tokenizer_class"),
        (
            "qwen2",
            {"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": True},
            "splits text in a way that isn't kn",
        ),
    ],
)
def test_refusals(tmp_path: Path, name: str, settings: dict[str, Any], pattern: str) -> None:
    directory = split(tmp_path / "model", name, **settings)
    with pytest.raises(D2QError, match=pattern) as caught:
        read(directory, name)
    assert "\n" not in str(caught.value)


def test_damaged_files(tmp_path: Path) -> None:
    directory = split(tmp_path / "model", "qwen2")
    (directory / "merges.txt").write_text("#version: 0.2\nqz qz\n")
    with pytest.raises(D2QError, match="can't load the tokenizer"):
        read(directory, "qwen2")
    (directory / "vocab.json").write_text("{")
    with pytest.raises(D2QError, match="can't load the tokenizer"):
        read(directory, "qwen2")
    (directory / "merges.txt").unlink()
    with pytest.raises(D2QError, match=r"no tokenizer.json or tokenizer.model, nor a vocab.json with merges.txt"):
        read(directory, "qwen2")


def test_ids_that_transformers_would_change(tmp_path: Path) -> None:
    """It numbers added tokens anew where the vocabulary leaves a gap before them."""
    directory = split(tmp_path / "model", "qwen2")
    vocab = json.loads((directory / "vocab.json").read_text())
    (directory / "vocab.json").write_text(json.dumps({text: i for text, i in vocab.items() if i != 599}))
    merges = (directory / "merges.txt").read_text("utf-8").splitlines()
    last = next(text for text, i in vocab.items() if i == 599)
    kept = [line for line in merges if line.replace(" ", "") != last]
    (directory / "merges.txt").write_text("\n".join(kept), "utf-8")
    with pytest.raises(D2QError, match=r"gives token .* the id 599, but tokenizer_config.json gives it 600"):
        read(directory, "qwen2")
