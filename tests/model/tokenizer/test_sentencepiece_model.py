"""Test the tokenizer.model parser against the sentencepiece package, and its error message for damaged files."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from d2q_edge.errors import D2QError
from d2q_edge.model.tokenizer.sentencepiece_model import read_model
from tests.model.tokenizer.tokenizers import sentencepiece_model

PROTO: Any = sentencepiece_model_pb2


@pytest.mark.parametrize(("prefix", "algorithm"), [(True, "bpe"), (False, "bpe"), (True, "unigram")])
def test_same_as_sentencepiece(tmp_path: Path, prefix: bool, algorithm: str) -> None:
    data = sentencepiece_model(prefix=prefix, symbols=("<pad>", "\u2581\u2581"), algorithm=algorithm)
    (tmp_path / "tokenizer.model").write_bytes(data)
    model = read_model(tmp_path / "tokenizer.model")
    proto = PROTO.ModelProto.FromString(data)
    assert [(p.text, p.score, p.kind) for p in model.pieces] == [(p.piece, p.score, p.type) for p in proto.pieces]
    assert {piece.kind for piece in model.pieces} == {1, 2, 3, 4, 6}
    assert model.algorithm == {"bpe": "BPE", "unigram": "Unigram"}[algorithm]
    assert model.adds_space_prefix == proto.normalizer_spec.add_dummy_prefix == prefix
    assert model.space_suffix is False
    processor = SentencePieceProcessor(model_proto=data)
    ids = {"unk": processor.unk_id(), "bos": processor.bos_id(), "eos": processor.eos_id(), "pad": processor.pad_id()}
    assert model.special_ids == {role: token_id for role, token_id in ids.items() if token_id >= 0}
    assert "pad" not in model.special_ids, "written as a negative number"


def test_settings_away_from_their_defaults(tmp_path: Path) -> None:
    proto = PROTO.ModelProto()
    for text, kind in (("<s>", 3), ("</s>", 3), ("<unk>", 2), ("a", 1)):
        proto.pieces.add(piece=text, score=-1.5, type=kind)
    proto.trainer_spec.model_type = 4
    proto.trainer_spec.treat_whitespace_as_suffix = True
    proto.trainer_spec.bos_id, proto.trainer_spec.eos_id = 0, 1
    proto.trainer_spec.unk_id, proto.trainer_spec.pad_id = 2, 99
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    model = read_model(tmp_path / "tokenizer.model")
    assert (model.algorithm, model.space_suffix, model.adds_space_prefix) == ("character", True, True)
    assert model.special_ids == {"bos": 0, "eos": 1, "unk": 2}
    assert model.pieces[3].score == -1.5


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 499723\n",
        b"IQ== 0\nIg== 1\nIw== 2\n",  # tiktoken's format, which Llama 3 has under this name
        b"\x0a\x05\x0a\x03ab",  # ends within a piece
        b"\x0a\x03\x0a\x01\xff",  # a text that isn't UTF-8
        b"\x0a\x02\x18\x09",  # a piece of kind 9
        b"\x08\x01",  # a number in place of the pieces
        b"\x0a" + b"\xff" * 11,  # a length without end
        b"\x0a\x05\x12\x03abc",  # a score that is a text
    ],
)
def test_damaged(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(D2QError, match=r"tokenizer.model isn't a SentencePiece model, or is damaged \(.+\); download"):
        read_model(tmp_path / "tokenizer.model")


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(D2QError, match=r"can't read .*tokenizer.model: No such file"):
        read_model(tmp_path / "tokenizer.model")


def test_random_damage(tmp_path: Path) -> None:
    """Any damage results in a model or in an error message."""
    original, generator = sentencepiece_model(), random.Random(0)
    path = tmp_path / "tokenizer.model"
    messages = 0
    for _ in range(300):
        data = bytearray(original[: generator.randrange(len(original))] if generator.random() < 0.3 else original)
        for _ in range(generator.randrange(1, 8)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        path.write_bytes(data)
        try:
            read_model(path)
        except D2QError:
            messages += 1
    assert messages > 100
