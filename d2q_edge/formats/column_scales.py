"""Record in a GGUF file what its columns were divided by (quantize/dsq.py), for adapters made for the original.

A scale is one byte, its logarithm in eighths of an octave: 4.4 % off at most. An adapter's effect is changed by so
little that rounding the weights hides it by far. A byte for each of a layer's inputs is 0.2 % of the file of a model of
34 million weights, and 0.03 % with 8 billion.

d2q.column_scales holds the bytes of one array after the other. d2q.column_scales.of has a string for each array: its
length, the tensors (joined by commas) whose columns were divided by it, and, if it isn't a norm, the tensor whose last
rows were multiplied by it. Where there are more columns than scales, query heads share those of a key-value head.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from d2q_edge.errors import D2QError
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.formats.tensor_types import F32, U8

CODES, USERS = "d2q.column_scales", "d2q.column_scales.of"
FIT = "d2q.adapter.column_scales_sha256"
"""Key of an adapter: the `scales_hash` of the file that it was rewritten for."""
STEPS, ONE = 8, 128
_USERS = re.compile(r"(\d{1,7}) ([\w.,-]+)(?: ([\w.-]+))?")


@dataclass(frozen=True)
class ColumnScales:
    """What a file's weights differ from the original's by: W' = rows W / columns.

    Attributes:
        columns: by tensor, float32 [in_features].
        rows: by tensor, float32 [out_features].
    """

    columns: dict[str, F32] = field(default_factory=dict)
    rows: dict[str, F32] = field(default_factory=dict)


def encode_scales(scales: F32) -> U8:
    """Return the codes, uint8, of positive scales, float32, of the same shape."""
    return (np.log2(scales) * STEPS + ONE).round().clip(0, 255).astype(np.uint8)


def describe_users(count: int, columns: Sequence[str], rows: str | None) -> str:
    """Return the string for USERS: an array's length and the tensors that it belongs to."""
    return " ".join([str(count), ",".join(columns), *([rows] if rows else [])])


def scales_hash(file: GGUFFile) -> str | None:
    """Return a checksum of a file's scales; None if it has none."""
    raw = file.raw_values.get(CODES)
    return None if raw is None else hashlib.sha256(raw).hexdigest()


def read_scales(file: GGUFFile) -> ColumnScales:
    """Return the column scales of a file; those of one whose columns weren't scaled are empty.

    Raises:
        D2QError: the file's weights were rotated, or scaled by an earlier version; or its keys make no sense.
    """
    recipe = _recipe(file)
    if recipe.get("rotation"):
        raise D2QError(
            f"{file.path} was converted with --rotation on, which adapters don't survive; convert it without"
        )
    codes, users = file.kv.get(CODES), file.kv.get(USERS)
    if codes is None and users is None:
        if recipe.get("dsq") and file.kv.get(f"{file.kv.get('general.architecture')}.expert_count"):
            raise D2QError(
                f"{file.path} has experts, whose files don't say how their columns were scaled: merge the adapter into "
                "the model by `d2q-edge convert MODEL --adapter DIR`, or convert the model with --no-dsq"
            )
        if recipe.get("dsq"):
            raise D2QError(
                f"{file.path} doesn't say how its columns were scaled: convert the model again, with this version or "
                "with --no-dsq"
            )
        return ColumnScales()
    scales, start = ColumnScales(), 0
    try:
        values = np.exp2((np.array(codes, np.uint8).astype(np.float32) - ONE) / STEPS)
        for text in users or ():
            match = _USERS.fullmatch(text)
            if match is None:
                raise ValueError(text)
            array = values[start : start + int(match[1])]
            start += int(match[1])
            for name in match[2].split(","):
                scales.columns[name] = _expanded(file, array, file.tensors[name].shape[-1])
            if match[3]:
                rows = np.ones(file.tensors[match[3]].shape[-2], np.float32)
                rows[len(rows) - len(array) :] = array
                scales.rows[match[3]] = rows
        if start != len(values):
            raise ValueError("another length")
    except (TypeError, ValueError, KeyError, IndexError, ArithmeticError) as error:
        raise D2QError(f"{file.path} is malformed: {CODES} doesn't fit its tensors ({error})") from error
    return scales


def _expanded(file: GGUFFile, array: F32, width: int) -> F32:
    """Return a scale for each of `width` columns."""
    if len(array) == width:
        return array
    heads = file.kv[f"{file.kv['general.architecture']}.attention.head_count_kv"]
    if isinstance(heads, list):
        # A number for each block, zero where it has no attention.
        heads = max(heads)
    groups: npt.NDArray[np.float32] = array.reshape(heads, 1, -1).repeat(width // len(array), axis=1).reshape(-1)
    if len(groups) != width:
        raise ValueError(f"{len(array)} scales for {width} columns")
    return groups


def _recipe(file: GGUFFile) -> dict[str, Any]:
    """Return d2q.recipe; {} if the file has none."""
    try:
        recipe = json.loads(file.kv.get("d2q.recipe", "{}"))
    except (TypeError, ValueError, RecursionError):
        recipe = None
    if not isinstance(recipe, dict):
        raise D2QError(f"{file.path} is malformed: its d2q.recipe can't be read")
    return recipe
