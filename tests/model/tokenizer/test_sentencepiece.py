"""Test SentencePiece tokenizers: what comes from which of the two files, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from d2q_edge.errors import D2QError
from d2q_edge.export.tokenizer_check import verify
from d2q_edge.model.tokenizer import Tokenizer, read_tokenizer
from tests.availability import require_runtime
from tests.model.tokenizer.families import FAMILIES, METASPACE
from tests.model.tokenizer.tokenizers import sentencepiece_model
from tests.model.tokenizer.vocabulary_file import tokenizer_keys, write_vocabulary

Edit = Callable[[dict[str, Any]], object]
Write = Callable[..., Path]
KIND = gguf.TokenType


@pytest.fixture
def make(tmp_path: Path) -> Write:
    """make(family, keep=("json", "model"), change=None): a tokenizer's directory; `change` edits tokenizer.json."""

    def write(name: str, *keep: str, change: Edit | None = None) -> Path:
        parent = tmp_path / str(len(list(tmp_path.iterdir())))
        parent.mkdir()
        directory = FAMILIES[name].write(parent / name, keep=keep or ("json", "model"))
        if change is not None:
            content = json.loads((directory / "tokenizer.json").read_text("utf-8"))
            change(content)
            (directory / "tokenizer.json").write_text(json.dumps(content), "utf-8")
            # Otherwise it has the last word on added tokens.
            (directory / "tokenizer_config.json").write_text("{}")
        return directory

    return write


def read(directory: Path, vocab_size: int = 624, **config: Any) -> Tokenizer:
    return read_tokenizer(directory, config, vocab_size)


def test_llama_2(make: Write) -> None:
    tokenizer = read(make("llama2"))
    assert (tokenizer.model, tokenizer.pre) == ("llama", "default")
    assert tokenizer.tokens[:3] == ["<unk>", "<s>", "</s>"]
    assert tokenizer.tokens[3] == "<0x00>"
    assert tokenizer.types[3] == KIND.BYTE
    assert tokenizer.tokens[600:602] == ["<pad>", "[PAD601]"]
    assert tokenizer.types[600:602] == [KIND.CONTROL, KIND.UNUSED]
    assert tokenizer.scores is not None
    assert tokenizer.scores[259:262] == [0.0, -1.0, -2.0]
    assert tokenizer.scores[600:602] == [-1000.0, -10000.0]
    assert tokenizer.special_ids == {"bos": 1, "eos": 2, "unk": 0, "pad": 600}
    assert tokenizer.merges == []
    assert (tokenizer.bos, tokenizer.adds_space_prefix) == (1, True)


def test_gemma(make: Write) -> None:
    tokenizer = read(make("gemma3"))
    assert not tokenizer.adds_space_prefix
    assert tokenizer.tokens[4:9] == ["\n", "\n\n", "\n\n\n", "  ", "   "]
    assert tokenizer.types[4:9] == [KIND.USER_DEFINED] * 5
    assert tokenizer.types[tokenizer.tokens.index("<unused0>")] == KIND.CONTROL


def test_scores_from_merges(make: Write) -> None:
    both, alone = read(make("llama2")), read(make("llama2", "json"))
    assert both.scores is not None
    assert alone.scores is not None
    assert alone.scores[259:600] == both.scores[259:600], "merges first, then single characters, as SentencePiece"
    assert alone.tokens == both.tokens
    assert alone.types == both.types


def test_model_alone(make: Write, tmp_path: Path) -> None:
    directory = make("gemma3", "model")
    (directory / "tokenizer_config.json").unlink()
    tokenizer = read(directory)
    assert tokenizer.types[4:9] == [KIND.USER_DEFINED] * 5
    assert tokenizer.types[:3] == [KIND.UNKNOWN, KIND.CONTROL, KIND.CONTROL]
    assert (tokenizer.special_ids, tokenizer.add_special, tokenizer.bos) == ({}, {}, 1)
    keys = dict(tokenizer_keys(write_vocabulary(tmp_path / "out.gguf", tokenizer)))
    assert keys["tokenizer.ggml.add_space_prefix"] is False
    directory = make("llama2", "model")
    keys = dict(tokenizer_keys(write_vocabulary(tmp_path / "other.gguf", read(directory))))
    assert "tokenizer.ggml.add_space_prefix" not in keys


def test_unusual_ids_of_a_model_alone(make: Write) -> None:
    from sentencepiece import sentencepiece_model_pb2

    directory = make("llama2", "model")
    model: Any = sentencepiece_model_pb2
    proto = model.ModelProto.FromString(sentencepiece_model())
    proto.trainer_spec.bos_id, proto.trainer_spec.eos_id = 2, 1
    (directory / "tokenizer.model").write_bytes(proto.SerializeToString())
    assert read(directory).special_ids == {"bos": 2, "eos": 1}
    assert read(directory, bos_token_id=5).special_ids == {"bos": 5, "eos": 1}


def test_added_tokens_json(make: Write) -> None:
    directory = make("llama2", "model")
    (directory / "added_tokens.json").write_text(json.dumps({"<extra>": 600, "<more>": 601}))
    tokenizer = read(directory)
    assert tokenizer.tokens[600:602] == ["<extra>", "<more>"]
    assert tokenizer.types[600:602] == [KIND.USER_DEFINED] * 2


def test_space_prefix_by_the_pre_tokenizer(make: Write) -> None:
    for scheme, prefix, gaps in (
        ("first", True, {"leading", "special"}),
        ("always", True, {"leading", "special"}),
        ("never", False, set()),
    ):
        metaspace = {**METASPACE, "prepend_scheme": scheme}
        directory = make("mistral", change=lambda content, new=metaspace: content.update(pre_tokenizer=new))
        tokenizer = read(directory)
        assert tokenizer.adds_space_prefix == prefix, scheme
        assert tokenizer.gaps == gaps, scheme
    old = {"type": "Metaspace", "replacement": "\u2581", "add_prefix_space": False, "split": False}
    assert not read(make("mistral", change=lambda content: content.update(pre_tokenizer=old))).adds_space_prefix


@pytest.mark.parametrize("special", [True, False])
def test_added_tokens_beyond_the_embeddings(make: Write, special: bool) -> None:
    """Gemma 3's text models have an image token, fine-tunes of Llama 2 a padding token."""

    def add(content: dict[str, Any]) -> None:
        content["added_tokens"].append({"id": 624, "content": "<image>", "special": special})

    tokenizer = read(make("gemma3", change=add))
    assert "<image>" not in tokenizer.tokens
    assert tokenizer.left_out == {"<image>"}
    assert tokenizer.notes == ("the token '<image>' is left out: the tokenizer has more than the model's 624",)


def test_padding_in_added_tokens_json_alone(make: Write, tmp_path: Path) -> None:
    directory = make("llama2")
    (directory / "added_tokens.json").write_text(json.dumps({"[PAD]": 624}))
    tokenizer = read(directory)
    assert tokenizer.left_out == {"[PAD]"} and len(tokenizer.tokens) == 624
    require_runtime()
    verify(write_vocabulary(tmp_path / "x.gguf", tokenizer), directory, tokenizer)


def test_space_before_every_part_between_special_tokens(make: Write, tmp_path: Path) -> None:
    """What transformers 5 saves of a tokenizer that was "legacy"; llama.cpp puts one before the first part only."""
    metaspace = {**METASPACE, "prepend_scheme": "always"}
    directory = make("mistral", "json", change=lambda content: content.update(pre_tokenizer=metaspace, normalizer=None))
    tokenizer = read(directory)
    require_runtime()
    verify(write_vocabulary(tmp_path / "x.gguf", tokenizer), directory, tokenizer)


def test_bos_only_where_transformers_adds_it(make: Write) -> None:
    directory = make("llama2", change=lambda content: content.update(post_processor=None))
    assert read(directory).add_special == {"bos": False}
    assert read(directory).bos is None
    (directory / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "bos_token": "<s>"}))
    assert read(directory).add_special == {"bos": True}


def test_vocabulary_larger_than_the_embeddings(make: Write) -> None:
    for keep in (("json",), ("model",), ("json", "model")):
        with pytest.raises(D2QError, match=r"but the model has 590 tokens only"):
            read(make("llama2", *keep), vocab_size=590)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda c: c["model"]["merges"].pop(5), "doesn't merge .* although .* is a token"),
        (lambda c: c["model"]["vocab"].update({"<s>": 3}), "the id 3 to both|gives token '<s>' the id"),
        (lambda c: c["model"]["vocab"].update(zzz=5), "gives the id 5 to both"),
        (lambda c: c["model"]["vocab"].update(zzz=-1), "gives token 'zzz' the id -1"),
        (lambda c: c["model"]["vocab"].update(zzz=10**12), "'zzz' the id 1000000000000, but the model has 624 tokens"),
        (lambda c: c["model"]["vocab"].update(zzz="5"), "structure of a tokenizer"),
        (lambda c: c["model"]["vocab"].pop("<0x41>"), "has no token <0x41>; llama.cpp needs one for every byte"),
        (lambda c: c["model"]["merges"].append(["a", "zzz"]), "merges 'a' and 'zzz', but not both and the result"),
        (lambda c: c.update(normalizer={"type": "NFKC"}), "normalizes text with .*NFKC.* llama.cpp can't do"),
        (lambda c: c.update(normalizer=None), "normalizes text with null and splits it with null"),
        (lambda c: c.update(pre_tokenizer={"type": "Digits"}), "splits it with .*Digits"),
        (lambda c: c["added_tokens"].append({"content": "<x>"}), "structure of a tokenizer"),
        (lambda c: c["added_tokens"].append({"content": "<x>", "id": "7"}), "gives token '<x>' the id '7'"),
        (
            lambda c: c["added_tokens"].append({"content": "<x>", "id": 600}),
            "gives the id 600 to both '<pad>' and '<x>'",
        ),
        (lambda c: c["added_tokens"].append({"content": "[PAD620]", "id": 601}), "token '\\[PAD620\\]' twice"),
        (lambda c: c["model"].update(vocab=[]), "structure of a tokenizer"),
    ],
)
def test_refused_tokenizer_json(make: Write, change: Edit, pattern: str) -> None:
    with pytest.raises(D2QError, match=pattern):
        read(make("llama2", "json", change=change))


def test_metaspace_that_splits(make: Write) -> None:
    split = {**METASPACE, "split": True}
    with pytest.raises(D2QError, match=r"splits text at spaces, which llama.cpp doesn't do .* such as '\u2581\u2581"):
        read(make("mistral", change=lambda content: content.update(pre_tokenizer=split)))


def test_files_that_do_not_belong_together(make: Write) -> None:
    def swap(content: dict[str, Any]) -> None:
        vocab = content["model"]["vocab"]
        first, second = list(vocab)[300:302]
        vocab[first], vocab[second] = vocab[second], vocab[first]

    with pytest.raises(D2QError, match=r"token 300 is '.*' in .*tokenizer.model, but not in .*tokenizer.json"):
        read(make("llama2", change=swap))


def test_other_algorithms(make: Write) -> None:
    directory = make("llama2", "model")
    (directory / "tokenizer.model").write_bytes(sentencepiece_model(algorithm="unigram"))
    with pytest.raises(D2QError, match=r"is a Unigram model; llama.cpp can do SentencePiece's BPE only"):
        read(directory)


def test_pre_tokenizer_is_for_byte_level(make: Write) -> None:
    with pytest.raises(D2QError, match=r"--pre-tokenizer is for byte-level BPE"):
        read_tokenizer(make("llama2"), {}, 624, "qwen2")


def test_byte_level_wins_over_a_tokenizer_model(make: Write) -> None:
    """Some Llama 3 repositories have a tokenizer.model that isn't SentencePiece's."""
    directory = make("llama3")
    (directory / "tokenizer.model").write_bytes(b"IQ== 0\n")
    assert read(directory).model == "gpt2"
