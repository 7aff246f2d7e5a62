"""Reads a SentencePiece `tokenizer.model`: pieces, scores and the settings that decide how text is tokenized.

The file is one protobuf message, ModelProto of sentencepiece_model.proto. Five kinds of fields out of it are all that a
GGUF needs, so that this is a reader of protobuf's wire format (https://protobuf.dev/programming-guides/encoding) and
not a dependency on sentencepiece, which would also hide the normalizer's settings.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from d2q_edge.errors import D2QError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of pieces; gguf.TokenType has the same numbers."""
_ALGORITHMS = {1: "Unigram", 2: "BPE", 3: "word", 4: "character"}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# Field numbers, by message.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE_TEXT, _PIECE_SCORE, _PIECE_KIND = 1, 2, 3
_TRAINER_ALGORITHM, _TRAINER_SUFFIX = 3, 24
_TRAINER_IDS = {"unk": 40, "bos": 41, "eos": 42, "pad": 43}
_NORMALIZER_PREFIX = 3


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; `kind` is NORMAL, UNKNOWN, ..."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """What a tokenizer.model says.

    Attributes:
        pieces: in the order of their ids.
        algorithm: "BPE", "Unigram", ...
        special_ids: role to id, of those that the model has.
        adds_space_prefix: whether text is tokenized as if a space came before it (add_dummy_prefix).
        space_suffix: whether the space belongs to the end of a word (treat_whitespace_as_suffix).
    """

    pieces: list[Piece]
    algorithm: str
    special_ids: dict[str, int]
    adds_space_prefix: bool
    space_suffix: bool


def read_model(path: Path) -> SentencePieceModel:
    """Read a tokenizer.model.

    Raises:
        D2QError: it can't be read, or isn't a SentencePiece model.
    """
    try:
        return _parse(path.read_bytes())
    except OSError as error:
        raise D2QError(f"can't read {path}: {error.strerror or error}") from error
    except (ValueError, struct.error) as error:
        raise D2QError(f"{path} isn't a SentencePiece model, or is damaged ({error}); download it again") from error


def _parse(data: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    # The defaults are those of sentencepiece_model.proto, which writes no field that has its default.
    algorithm, prefix, suffix = 1, True, False
    ids = {"unk": 0, "bos": 1, "eos": 2, "pad": -1}
    for number, value in _fields(data):
        if number == _PIECES:
            pieces.append(_piece(_message(value)))
        elif number == _TRAINER:
            trainer = dict(_fields(_message(value)))
            algorithm = _integer(trainer.get(_TRAINER_ALGORITHM, algorithm))
            suffix = bool(trainer.get(_TRAINER_SUFFIX, suffix))
            ids = {role: _integer(trainer.get(field, ids[role])) for role, field in _TRAINER_IDS.items()}
        elif number == _NORMALIZER:
            prefix = bool(dict(_fields(_message(value))).get(_NORMALIZER_PREFIX, prefix))
    if not pieces:
        raise ValueError("it has no pieces")
    known = {role: token_id for role, token_id in ids.items() if 0 <= token_id < len(pieces)}
    return SentencePieceModel(pieces, _ALGORITHMS.get(algorithm, f"number {algorithm}"), known, prefix, suffix)


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    text, score, kind = (
        _message(fields.get(_PIECE_TEXT, b"")),
        fields.get(_PIECE_SCORE, 0.0),
        fields.get(_PIECE_KIND, 1),
    )
    if not isinstance(score, float) or kind not in range(NORMAL, BYTE + 1):
        raise ValueError("a piece has a wrong type")
    return Piece(text.decode("utf-8"), score, _integer(kind))


def _message(value: int | float | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number stands where a message should")
    return value


def _integer(value: int | float | bytes) -> int:
    """An int32 field; of negative ones, which are written as 64 bits, it matters only that they are no ids."""
    if not isinstance(value, int):
        raise ValueError("a field has a wrong type")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """Number and value of every field of a message."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == _VARINT:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire_type == _BYTES:
            size, position = _varint(data, position)
        elif wire_type in (_FIXED32, _FIXED64):
            size = 4 if wire_type == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire_type}")
        if position + size > len(data):
            raise ValueError("it ends too early")
        raw = data[position : position + size]
        position += size
        yield number, struct.unpack("<f", raw)[0] if wire_type == _FIXED32 else raw


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number of seven bits per byte, lowest first, and where the next field starts."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise ValueError("it ends too early")
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError("a number is too long")
