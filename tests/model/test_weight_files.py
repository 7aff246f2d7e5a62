"""Test weight files: truncated, damaged and unusual headers, links, indexes and shards."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from d2q_edge.errors import D2QError
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from tests.opening import refused, rewrite

Make = Callable[..., Path]
INDEX = "model.safetensors.index.json"


def test_missing_shard(make_checkpoint: Make) -> None:
    directory = make_checkpoint(shards=3)
    (directory / "model-00002-of-00003.safetensors").unlink()
    refused(directory, "lacks model-00002-of-00003.safetensors; complete the download")


def test_missing_index(make_checkpoint: Make) -> None:
    directory = make_checkpoint(shards=2)
    (directory / INDEX).unlink()
    refused(directory, f"no {re.escape(INDEX)}")


@pytest.mark.parametrize("keep", [4, 8, 100, -1])
def test_truncated_file(make_checkpoint: Make, keep: int) -> None:
    directory = make_checkpoint()
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(directory, "model.safetensors is truncated")


def write_weights(directory: Path, header: bytes, data: int = 64) -> None:
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(data))


@pytest.mark.parametrize(
    "header",
    [
        b"{not json",
        b"[1]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64, 64]}}',
        b'{"a": {"dtype": ["F32"], "shape": [16], "data_offsets": [0, 64]}}',
        b'{"a": {"dtype": "\\u001b", "shape": [16], "data_offsets": [0, 64]}}',
        b'{"a": {"dtype": "F32", "shape": [1, 1, 1, 1, 1, 1, 1, 1, 16], "data_offsets": [0, 64]}}',
        b'{"a": {"dtype": "F32", "shape": [' + b",".join([b"9" * 4000] * 200) + b'], "data_offsets": [0, 64]}}',
        b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 64]}}',
        b'{"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]},'
        b' "a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}',
        b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}',
        b"[" * 100_000,
        b"\xff\xfe",
    ],
    ids=range(17),
)
def test_damaged_header(make_checkpoint: Make, header: bytes) -> None:
    directory = make_checkpoint()
    write_weights(directory, header)
    refused(directory, "damaged header|makes no sense")


@pytest.mark.parametrize(
    ("extents", "pattern"),
    [
        ([(0, 32), (16, 48), (48, 64)], "tensor b overlaps another one"),
        ([(0, 32), (0, 32), (32, 64)], "tensor b overlaps another one"),
        ([(0, 16), (32, 64)], "tensor b has unused bytes before it"),
        ([(4, 64)], "tensor a has unused bytes before it"),
        ([(0, 32), (32, 48)], "16 bytes at its end belong to no tensor"),
        ([], "64 bytes at its end belong to no tensor"),
        ([(0, 32), (32, 68)], "truncated: 4 bytes of tensor b are missing"),
    ],
)
def test_bytes_of_no_tensor_or_of_two(make_checkpoint: Make, extents: list[tuple[int, int]], pattern: str) -> None:
    directory = make_checkpoint()
    header = {
        name: {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]}
        for name, (begin, end) in zip("abc", extents, strict=False)
    }
    write_weights(directory, json.dumps(header).encode())
    refused(directory, pattern)


def test_order_and_empty_tensors_are_free(make_checkpoint: Make) -> None:
    """The format allows any order in the header, and empty tensors anywhere between others."""
    directory = make_checkpoint()
    extents = {"c": (0, 0), "b": (0, 32), "empty": (32, 32), "a": (32, 64), "z": (64, 64)}
    header = {
        name: {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]}
        for name, (begin, end) in extents.items()
    }
    write_weights(directory, json.dumps(header).encode())
    checkpoint = Checkpoint.open(directory)
    assert list(checkpoint.names) == sorted(extents)
    assert checkpoint.tensor("empty").shape == (0,)
    with safetensors.safe_open(directory / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == extents.keys(), "the format's own library agrees"


def test_header_that_is_too_large(make_checkpoint: Make) -> None:
    directory = make_checkpoint()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(200_000_000)
    refused(directory, "has a header of 100000001 bytes, more than the format allows")


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "\ud800", "\u202eb", "a" * 1001], ids=range(5))
def test_names_that_no_terminal_should_see(make_checkpoint: Make, name: str) -> None:
    directory = make_checkpoint()
    write_weights(directory, json.dumps({name: {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}).encode())
    with pytest.raises(D2QError, match=r"holds a tensor named '.*', which no model has") as caught:
        Checkpoint.open(directory)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["Gewicht ü", "../x", "a/b", "", "__metadata__x", "' OR 1=1"])
def test_names_that_are_only_odd(make_checkpoint: Make, name: str) -> None:
    directory = make_checkpoint()
    rewrite(directory, lambda tensors: tensors.update({name: torch.ones(3)}))
    assert Checkpoint.open(directory).tensor(name).tolist() == [1, 1, 1]
    refused(directory, re.escape(f"tensor {name} in") + ".* has no place in this architecture")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "README.md", "a.jinja"])
def test_links_out_of_the_directory(make_checkpoint: Make, tmp_path: Path, file: str) -> None:
    directory = make_checkpoint()
    outside = tmp_path / "outside"
    if (directory / file).exists():
        (directory / file).rename(outside)
    else:
        outside.write_text("secret")
    (directory / file).symlink_to(outside)
    refused(directory, f"{file} is a symbolic link to .*outside, outside of its directory; copy the file")


def test_templates_from_elsewhere(make_checkpoint: Make, tmp_path: Path) -> None:
    directory = make_checkpoint()
    (tmp_path / "elsewhere").mkdir()
    (directory / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    Checkpoint.open(directory)
    (tmp_path / "elsewhere" / "tools.jinja").touch()
    refused(directory, "additional_chat_templates/tools.jinja is a symbolic link to .*elsewhere/tools.jinja, outside")


def test_links_that_are_harmless(make_checkpoint: Make, tmp_path: Path) -> None:
    directory = make_checkpoint()
    (directory / "model.safetensors").rename(directory / "weights")
    (directory / "model.safetensors").symlink_to("weights")
    (directory / "notes").symlink_to("/etc/hostname")
    (tmp_path / "link").symlink_to(directory)
    for path in (directory, tmp_path / "link"):
        checkpoint = Checkpoint.open(path)
        checkpoint.check(family_for(checkpoint.config).tensor_shapes())


def test_link_to_nothing(make_checkpoint: Make) -> None:
    directory = make_checkpoint()
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").symlink_to("absent")
    refused(directory, "has no weights")


def test_keys_that_come_twice(make_checkpoint: Make) -> None:
    directory = make_checkpoint(shards=2)
    config = (directory / "config.json").read_text()
    (directory / "config.json").write_text(config.replace("{", '{"vocab_size": 1, ', 1))
    refused(directory, "config.json isn't valid JSON .the key 'vocab_size' comes twice")
    (directory / "config.json").write_text(config)
    index = (directory / INDEX).read_text()
    double = '"weight_map": {"model.norm.weight": "x.safetensors", '
    (directory / INDEX).write_text(index.replace('"weight_map": {', double))
    refused(directory, "index.json isn't valid JSON .the key 'model.norm.weight' comes twice")


@pytest.mark.parametrize(
    ("weight_map", "pattern"),
    [
        (None, "no weight_map"),
        ({}, "no weight_map"),
        ({"a": "../evil.safetensors"}, "isn't the plain name"),
        ({"a": "/etc/evil.safetensors"}, "isn't the plain name"),
        ({"a": "..\\evil.safetensors"}, "isn't the plain name"),
        ({"a": "weights.bin"}, "isn't the plain name"),
        ({"a": 5}, "isn't the plain name"),
        ({"a": "..safetensors"}, "isn't the plain name"),
        ({"a": "x\n.safetensors"}, "isn't the plain name"),
        ({"a\x1b": "x.safetensors"}, "isn't the plain name"),
        ([], "no weight_map"),
    ],
)
def test_bad_index(make_checkpoint: Make, weight_map: Any, pattern: str) -> None:
    directory = make_checkpoint(shards=2)
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refused(directory, pattern)


def test_index_names_a_tensor_that_its_shard_lacks(make_checkpoint: Make) -> None:
    directory = make_checkpoint(shards=2)
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"]["model.ghost.weight"] = "model-00001-of-00002.safetensors"
    (directory / INDEX).write_text(json.dumps(index))
    refused(directory, "says that model-00001-of-00002.safetensors holds tensor model.ghost.weight, but it doesn't")


def test_shard_has_a_tensor_that_the_index_lacks(make_checkpoint: Make) -> None:
    directory = make_checkpoint(shards=2)
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"].pop("model.norm.weight")
    (directory / INDEX).write_text(json.dumps(index))
    refused(directory, "holds tensor model.norm.weight, but .* doesn't say so")


@pytest.mark.parametrize("shards_are_there", [True, False])
def test_index_that_an_earlier_save_left(make_checkpoint: Make, shards_are_there: bool) -> None:
    """save_pretrained leaves the index in the directory of a formerly sharded model."""
    model = make_checkpoint(shards=2)
    checkpoint = Checkpoint.open(model)
    assert checkpoint.notes == ()
    tensors = {name: checkpoint.tensor(name) + 1 for name in checkpoint.names}
    save_file(tensors, model / "model.safetensors")
    if not shards_are_there:
        for shard in model.glob("model-0*"):
            shard.unlink()
    newer = Checkpoint.open(model)
    assert all(torch.equal(newer.tensor(name), tensor) for name, tensor in tensors.items())
    expected = f"{model} has model.safetensors and model.safetensors.index.json; the former is read, as by transformers"
    assert newer.notes == (expected,)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto").state_dict()
    assert torch.equal(loaded["model.norm.weight"], newer.tensor("model.norm.weight"))


@pytest.mark.parametrize("where", ["index", "shard"])
def test_index_and_shards_may_differ_in_derived_tensors(make_checkpoint: Make, where: str) -> None:
    model = make_checkpoint(shards=2)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    first = sorted(model.glob("model-0*"))[0]
    if where == "index":
        index = json.loads((model / INDEX).read_text())
        index["weight_map"][name] = first.name
        (model / INDEX).write_text(json.dumps(index))
    else:
        save_file({**load_file(first), name: torch.ones(8)}, first)
    checkpoint = Checkpoint.open(model)
    checkpoint.check(family_for(checkpoint.config).tensor_shapes())
