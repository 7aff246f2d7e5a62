"""Exports: the same file as llama.cpp's converter writes, and the rules for types, order and names without it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from d2q_edge import __version__
from d2q_edge.errors import D2QError
from d2q_edge.export.model_file import (
    Value,
    export,
    file_name,
    float_tensor,
    model_tensors,
    model_tokenizer,
    packed_tensor,
    write_model,
)
from d2q_edge.formats import tensor_types
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from tests.checkpoints import EXAMPLE
from tests.model.test_families import LLAMA3_ROPE

Make = Callable[..., Path]
Convert = Callable[[Path, str, str], Path]
README = """---
license: mit
model_name: Tiny
base_model: someone/Big-Model-7B-v0.2
tags: [a, b]
language: [en]
---
# Tiny
"""


def compare(ours: Path, stock: Path) -> None:
    """Keys, tensor names, order, shapes, types and bytes; last the whole files."""
    a, b = GGUFFile(ours), GGUFFile(stock)
    assert a.kv == b.kv
    assert list(a.tensors) == list(b.tensors)
    for name, info in a.tensors.items():
        other = b.tensors[name]
        assert (info.shape, info.type_name) == (other.shape, other.type_name), name
        assert np.array_equal(a.raw(name), b.raw(name)), name
    assert ours.read_bytes() == stock.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("type_name", ["f32", "f16", "bf16", "q8_0"])
def test_example_like_stock(stock_convert: Convert, tmp_path: Path, type_name: str) -> None:
    export(EXAMPLE, tmp_path / "ours.gguf", type_name)
    compare(tmp_path / "ours.gguf", stock_convert(EXAMPLE, type_name, "qwen2"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "type_name", "options"),
    [
        ("llama", "f16", {"rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0, "head_dim": 32, "shards": 3}),
        ("llama", "bf16", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("qwen2", "f16", {"tie_word_embeddings": True, "dtype": torch.float16}),
        ("qwen2", "q8_0", {"dtype": torch.float32, "intermediate_size": 72, "shards": 2}),
        ("qwen3", "bf16", {"dtype": torch.float32}),
    ],
)
def test_random_models_like_stock(
    make_checkpoint: Make,
    stock_convert: Convert,
    tmp_path: Path,
    family: str,
    type_name: str,
    options: dict[str, Any],
) -> None:
    model = make_checkpoint(family, name="tiny-7b-chat-v1.1", **options)
    (model / "README.md").write_text(README)
    sampling = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05}
    (model / "generation_config.json").write_text(json.dumps(sampling))
    export(model, tmp_path / "ours.gguf", type_name)
    compare(tmp_path / "ours.gguf", stock_convert(model, type_name, "llama-bpe" if family == "llama" else "qwen2"))


@pytest.mark.slow
def test_odd_added_tokens_like_stock(make_checkpoint: Make, stock_convert: Convert, tmp_path: Path) -> None:
    model = make_checkpoint("qwen3", bos_token_id=4094)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    for token_id, text, special in (("4096", "<extra>", True), ("4097", "<plain>", False), ("4098", "<|odd|>", False)):
        settings["added_tokens_decoder"][token_id] = {"content": text, "special": special, "normalized": False}
    settings["chat_template"] = [{"name": "default", "template": "{{ x }}"}, {"name": "tools", "template": "{{ y }}"}]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    export(model, tmp_path / "ours.gguf", "f16")
    compare(tmp_path / "ours.gguf", stock_convert(model, "f16", "qwen2"))


def test_types_by_kind_of_tensor(make_checkpoint: Make, tmp_path: Path) -> None:
    model = make_checkpoint("qwen2", intermediate_size=72)
    export(model, tmp_path / "out.gguf", "q8_0")
    types = {name: info.type_name for name, info in GGUFFile(tmp_path / "out.gguf").tensors.items()}
    assert types["token_embd.weight"] == types["output.weight"] == types["blk.0.attn_q.weight"] == "q8_0"
    assert types["blk.0.attn_q.bias"] == types["blk.0.attn_norm.weight"] == types["output_norm.weight"] == "f32"
    assert types["blk.1.ffn_down.weight"] == "f16", "72 columns can't be blocks of 32"


@pytest.mark.parametrize("type_name", ["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_values_survive(make_checkpoint: Make, tmp_path: Path, type_name: str) -> None:
    model = make_checkpoint("llama")
    export(model, tmp_path / "out.gguf", type_name)
    file = GGUFFile(tmp_path / "out.gguf")
    checkpoint = Checkpoint.open(model)
    family = family_for(checkpoint.config)
    # Half a step of the type, relative to a block's largest value (about 4 sigma of 0.05).
    tolerance = {"f32": 0, "f16": 2e-4, "bf16": 0, "q8_0": 2e-3, "q5_1": 0.02, "q5_0": 0.03, "q4_1": 0.03, "q4_0": 0.05}
    for name in family.tensor_shapes():
        expected = family.export_rows(name, checkpoint.tensor(name).float().numpy())
        np.testing.assert_allclose(file.dequantize(family.gguf_name(name)), expected, atol=tolerance[type_name], rtol=0)
    assert (
        file.kv["general.file_type"]
        == gguf.LlamaFileType["ALL_F32" if type_name == "f32" else f"MOSTLY_{type_name.upper()}"]
    )


@pytest.mark.parametrize(
    ("type_name", "number", "fallback", "tolerance"),
    [("q6_k", 18, "q8_0", 0.005), ("q5_k", 16, "q5_1", 0.02), ("q4_k", 14, "q5_0", 0.03)],
)
def test_k_types(
    make_checkpoint: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    type_name: str,
    number: int,
    fallback: str,
    tolerance: float,
) -> None:
    model = make_checkpoint("llama", hidden_size=256, intermediate_size=96)
    export(model, tmp_path / "out.gguf", type_name)
    message = f"2 of 16 matrices become {fallback}: their width isn't a multiple of {type_name}'s block size\n"
    assert capsys.readouterr().err == message
    file = GGUFFile(tmp_path / "out.gguf")
    assert file.kv["general.file_type"] == number
    checkpoint = Checkpoint.open(model)
    family = family_for(checkpoint.config)
    for name, shape in family.tensor_shapes().items():
        expected = family.export_rows(name, checkpoint.tensor(name).float().numpy())
        found = family.gguf_name(name)
        np.testing.assert_allclose(file.dequantize(found), expected, atol=tolerance, rtol=0)
        width = shape[-1] if len(shape) == 2 else 0
        assert file.tensors[found].type_name == {256: type_name, 96: fallback, 0: "f32"}[width]


def test_keys_of_a_llama(make_checkpoint: Make, tmp_path: Path) -> None:
    model = make_checkpoint("llama")
    export(model, tmp_path / "out.gguf", "f16")
    kv = GGUFFile(tmp_path / "out.gguf").kv
    assert kv["general.architecture"] == "llama"
    assert kv["general.name"] == "Tiny"
    assert kv["llama.block_count"] == 2
    assert kv["llama.attention.head_count_kv"] == 2
    assert kv["llama.attention.key_length"] == kv["llama.rope.dimension_count"] == 16
    assert kv["llama.vocab_size"] == len(kv["tokenizer.ggml.tokens"]) == 4100
    assert kv["tokenizer.ggml.pre"] == "llama-bpe"
    assert kv["tokenizer.ggml.bos_token_id"] == 4093
    assert kv["tokenizer.ggml.add_bos_token"] is True
    assert kv["tokenizer.chat_template"] == "{{ messages }}"
    assert "general.quantized_by" not in kv


def test_redundant_head_is_left_out(make_checkpoint: Make, tmp_path: Path) -> None:
    model = make_checkpoint(tie_word_embeddings=True)
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, model / "model.safetensors")
    export(model, tmp_path / "out.gguf", "f16")
    assert "output.weight" not in GGUFFile(tmp_path / "out.gguf").tensors


def test_mixture_with_own_types(make_checkpoint: Make, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint("llama", hidden_size=256, intermediate_size=64))
    family = family_for(checkpoint.config)
    own = tensor_types.BY_NAME["d2q2"]
    rng = np.random.default_rng(0)
    scales = rng.uniform(0.1, 1, (256, 1)).astype(np.float16)
    codebooks, codes = rng.integers(0, 256, (256, 8), np.uint8), rng.integers(0, 16, (256, 128), np.uint8)
    packed = tensor_types.pack(own, scales, codebooks, codes)
    q_name, embedding = "model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight"
    weights = rng.standard_normal((4100, 256)).astype(np.float32)
    replacements = {
        q_name: packed_tensor(family, q_name, "d2q2", lambda: packed),
        embedding: float_tensor(family, embedding, "q8_0", lambda: weights),
    }
    tensors = model_tensors(checkpoint, family, "f16", replacements)
    extra: dict[str, Value] = {
        "d2q.bits": 2.5,
        "d2q.version": 1,
        "d2q.calibrated": True,
        "d2q.text": "builtin",
        "d2q.list": [1, 2],
    }
    size = write_model(
        tmp_path / "out.gguf",
        checkpoint,
        family,
        model_tokenizer(checkpoint, family),
        tensors,
        file_type=80,
        extra=extra,
    )
    file = GGUFFile(tmp_path / "out.gguf")
    assert size == file.size
    assert list(file.tensors) == [family.gguf_name(name) for name in checkpoint.names]
    assert file.tensors["blk.1.attn_q.weight"].type_name == "d2q2"
    assert file.tensors["blk.1.attn_q.weight"].shape == (256, 256)
    expected = family.export_rows(q_name, tensor_types.dequantize(own, packed))
    assert np.array_equal(file.dequantize("blk.1.attn_q.weight"), expected)
    assert not np.array_equal(expected, tensor_types.dequantize(own, packed))
    np.testing.assert_allclose(file.dequantize("token_embd.weight"), weights, atol=0.02)
    assert file.tensors["blk.0.attn_q.weight"].type_name == "f16"
    assert {key: file.kv[key] for key in extra} == extra
    assert file.kv["general.quantized_by"] == f"d2q-edge {__version__}"
    assert file.kv["general.file_type"] == 80


def test_damaged_weights_leave_nothing_behind(make_checkpoint: Make, tmp_path: Path) -> None:
    model = make_checkpoint()
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, model / "model.safetensors")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(D2QError, match=r"tensor model.layers.1.mlp.up_proj.weight .* NaN"):
        export(model, out / "out.gguf", "f16")
    assert list(out.iterdir()) == []


def test_overflow_of_float16_is_refused(make_checkpoint: Make, tmp_path: Path) -> None:
    model = make_checkpoint()
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(D2QError, match=r"tensor blk.1.ffn_up.weight has values too large for float16"):
        export(model, tmp_path / "out.gguf", "f16")
    export(model, tmp_path / "out.gguf", "bf16")


def test_unknown_type(tmp_path: Path) -> None:
    with pytest.raises(
        D2QError, match="'q2_k' isn't a stock type that can be written; these are: f32, f16, bf16, q8_0"
    ):
        export(EXAMPLE, tmp_path / "out.gguf", "q2_k")


def test_file_names(make_checkpoint: Make) -> None:
    checkpoint = Checkpoint.open(EXAMPLE)
    assert file_name(checkpoint, family_for(checkpoint.config), "D2Q2") == "Tiny-Qwen3-4.2M-D2Q2.gguf"
    checkpoint = Checkpoint.open(make_checkpoint(name="nice-611K-instruct-v2"))
    assert file_name(checkpoint, family_for(checkpoint.config), "D2Q3") == "nice-611K-instruct-v2-D2Q3.gguf"
