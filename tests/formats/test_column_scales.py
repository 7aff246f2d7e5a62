"""Column scales in a file's keys: their codes, and keys of untrusted files."""

from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from d2q_edge.errors import D2QError
from d2q_edge.formats.column_scales import ColumnScales, describe_users, encode_scales, read_scales, scales_hash
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.formats.gguf_writer import GGUFTensor, write_gguf

SHAPES = {"blk.0.attn_q.weight": (128, 64), "blk.0.attn_v.weight": (64, 64), "blk.0.attn_output.weight": (64, 128)}


def write(path: Path, **keys: Any) -> GGUFFile:
    """Write a model of four heads, two for keys and values, with keys named d2q__x."""
    tensors = [GGUFTensor(name, shape, "f32", partial(np.zeros, shape, np.float32)) for name, shape in SHAPES.items()]
    tensors.append(GGUFTensor("output_norm.weight", (64,), "f32", partial(np.zeros, 64, np.float32)))

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_head_count_kv(2)
        for key, value in keys.items():
            adders = {str: writer.add_string, int: writer.add_uint32}
            adders.get(type(value), writer.add_array)(key.replace("__", "."), value)

    write_gguf(path, "qwen3", tensors, add)
    return GGUFFile(path)


def test_codes() -> None:
    values = np.array([1e-4, 2**-0.5, 1, 1.04, 1.05, 2, 1e4], np.float32)
    assert encode_scales(values).tolist() == [22, 124, 128, 128, 129, 136, 234]


def test_what_is_read(tmp_path: Path) -> None:
    """Two key-value heads of 32 channels; each serves two query heads."""
    shared, own = np.arange(64, dtype=np.uint8), np.arange(64, 128, dtype=np.uint8)
    users = [
        describe_users(64, ["blk.0.attn_q.weight", "blk.0.attn_v.weight"], None),
        describe_users(64, ["blk.0.attn_output.weight"], "blk.0.attn_v.weight"),
    ]
    keys = {"d2q__column_scales": bytes([*shared, *own]), "d2q__column_scales__of": users}
    file = write(tmp_path / "a.gguf", **keys)
    scales = read_scales(file)
    first, second = (np.exp2((codes.astype(np.float32) - 128) / 8) for codes in (shared, own))
    assert scales.columns.keys() == SHAPES.keys()
    for name in ("blk.0.attn_q.weight", "blk.0.attn_v.weight"):
        np.testing.assert_array_equal(scales.columns[name], first)
    expected = np.concatenate([second[:32], second[:32], second[32:], second[32:]])
    np.testing.assert_array_equal(scales.columns["blk.0.attn_output.weight"], expected)
    np.testing.assert_array_equal(scales.rows["blk.0.attn_v.weight"], second)
    other = write(tmp_path / "b.gguf", **{**keys, "d2q__column_scales": bytes([*own, *shared])})
    assert scales_hash(file) not in (None, scales_hash(other))


@pytest.mark.parametrize("keys", [{}, {"d2q__recipe": '{"dsq": false, "rotation": false}'}])
def test_files_without_scales(tmp_path: Path, keys: dict[str, Any]) -> None:
    file = write(tmp_path / "a.gguf", **keys)
    assert read_scales(file) == ColumnScales()
    assert scales_hash(file) is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"d2q__recipe": '{"rotation": true}'}, "was converted with --rotation on"),
        ({"d2q__recipe": '{"dsq": true}'}, "doesn't say how its columns were scaled: convert the model again"),
        ({"d2q__recipe": "[]"}, "its d2q.recipe can't be read"),
        ({"d2q__recipe": "[" * 10_000}, "its d2q.recipe can't be read"),
        ({"d2q__recipe": 5}, "its d2q.recipe can't be read"),
        ({"d2q__column_scales": bytes(64)}, "doesn't fit its tensors"),
        ({"d2q__column_scales": bytes(64), "d2q__column_scales__of": ["64 blk.0.none.weight"]}, "doesn't fit its"),
        ({"d2q__column_scales": bytes(64), "d2q__column_scales__of": ["65 blk.0.attn_q.weight"]}, "doesn't fit its"),
        ({"d2q__column_scales": bytes(64), "d2q__column_scales__of": ["9" * 99 + " blk.0.attn_q.weight"]}, "doesn't"),
        ({"d2q__column_scales": bytes(3), "d2q__column_scales__of": ["3 blk.0.attn_q.weight"]}, "doesn't fit its"),
        ({"d2q__column_scales": bytes(64), "d2q__column_scales__of": ["0 blk.0.attn_q.weight"]}, "doesn't fit its"),
        ({"d2q__column_scales": [300] * 64, "d2q__column_scales__of": ["64 blk.0.attn_q.weight"]}, "doesn't fit its"),
        ({"d2q__column_scales": ["a"], "d2q__column_scales__of": ["64 blk.0.attn_q.weight"]}, "doesn't fit its"),
        ({"d2q__column_scales": 5, "d2q__column_scales__of": [5]}, "doesn't fit its"),
        (
            {"d2q__column_scales": bytes(64), "d2q__column_scales__of": ["64 blk.0.attn_q.weight output_norm.weight"]},
            "doesn't fit its",
        ),
    ],
)
def test_keys_that_make_no_sense(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    file = write(tmp_path / "bad.gguf", **keys)
    with pytest.raises(D2QError, match=message):
        read_scales(file)
