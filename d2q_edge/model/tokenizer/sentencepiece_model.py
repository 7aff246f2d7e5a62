"""Parse a SentencePiece `tokenizer.model`: pieces, scores and the settings that decide how text is tokenized.

The file is one protobuf message, ModelProto of sentencepiece_model.proto. This reads protobuf's wire format
(https://protobuf.dev/programming-guides/encoding), because the sentencepiece package hides the normalizer's settings.
"""

import struct
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from gguf import TokenType

from d2q_edge.errors import D2QError

_ALGORITHMS = {1: "Unigram", 2: "BPE", 3: "word", 4: "character"}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# Field numbers, by message.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE_TEXT, _PIECE_SCORE, _PIECE_KIND = 1, 2, 3
_TRAINER_ALGORITHM, _TRAINER_SUFFIX = 3, 24
_TRAINER_IDS = {"unk": (40, 0), "bos": (41, 1), "eos": (42, 2), "pad": (43, -1)}
_NORMALIZER_PREFIX = 3

T = TypeVar("T", int, float, bytes)
_Fields = defaultdict[int, list[int | float | bytes]]


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary."""

    text: str
    score: float
    kind: int  # NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED or BYTE, with the numbers of gguf.TokenType


@dataclass(frozen=True)
class SentencePieceModel:
    """The content of a tokenizer.model."""

    pieces: list[Piece]  # in the order of their ids
    algorithm: str  # "BPE", "Unigram", ...
    special_ids: dict[str, int]  # by role, for the roles that the model has
    adds_space_prefix: bool  # whether text is tokenized as if a space came before it (add_dummy_prefix)
    space_suffix: bool  # whether the space belongs to the end of a word (treat_whitespace_as_suffix)


def read_model(path: Path) -> SentencePieceModel:
    """Read a tokenizer.model; raise D2QError if it can't be read or isn't a SentencePiece model."""
    try:
        return _parse(path.read_bytes())
    except OSError as error:
        raise D2QError(f"can't read {path}: {error.strerror or error}") from error
    except (ValueError, TypeError, struct.error) as error:
        raise D2QError(f"{path} isn't a SentencePiece model, or is damaged ({error}); download it again") from error


def _parse(data: bytes) -> SentencePieceModel:
    # The defaults are those of sentencepiece_model.proto: a field that has its default isn't in the file.
    model = _fields(data)
    trainer, normalizer = _fields(_last(model, _TRAINER, b"")), _fields(_last(model, _NORMALIZER, b""))
    pieces = [_piece(value) for value in model[_PIECES]]
    if not pieces:
        raise ValueError("it has no pieces")
    algorithm = _last(trainer, _TRAINER_ALGORITHM, 1)
    ids = {role: _last(trainer, field, default) for role, (field, default) in _TRAINER_IDS.items()}
    return SentencePieceModel(
        pieces,
        _ALGORITHMS.get(algorithm, f"number {algorithm}"),
        # Negative ids, which mean that there is no such token, are written as 64 bits.
        {role: token_id for role, token_id in ids.items() if 0 <= token_id < len(pieces)},
        bool(_last(normalizer, _NORMALIZER_PREFIX, 1)),
        bool(_last(trainer, _TRAINER_SUFFIX, 0)),
    )


def _piece(data: int | float | bytes) -> Piece:
    if not isinstance(data, bytes):
        raise ValueError("a piece is a number")
    fields = _fields(data)
    kind = _last(fields, _PIECE_KIND, int(TokenType.NORMAL))
    if not TokenType.NORMAL <= kind <= TokenType.BYTE:
        raise ValueError("a piece has a wrong type")
    return Piece(_last(fields, _PIECE_TEXT, b"").decode("utf-8"), _last(fields, _PIECE_SCORE, 0.0), kind)


def _last(fields: _Fields, number: int, default: T) -> T:
    """Return a field's value, the last one if it is repeated, as the type of its default."""
    value = fields[number][-1] if fields[number] else default
    if not isinstance(value, type(default)):
        raise ValueError(f"field {number} has a wrong type")
    return value


def _fields(data: bytes) -> _Fields:
    """Return the values of a message's fields by number."""
    fields: _Fields = defaultdict(list)
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == _VARINT:
            value, position = _varint(data, position)
            fields[number].append(value)
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
        fields[number].append(struct.unpack("<f", raw)[0] if wire_type == _FIXED32 else raw)
    return fields


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Return a number of seven bits per byte, lowest first, and the position after it."""
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
