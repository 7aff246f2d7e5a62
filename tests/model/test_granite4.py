"""Test that a dense Granite 4 becomes the file that llama.cpp's converter makes of it, and computes what it did."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from d2q_edge.conversion import convert
from d2q_edge.errors import D2QError
from d2q_edge.export.model_file import export
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from d2q_edge.model.granite4 import granite_config
from d2q_edge.options import Options
from tests.end_to_end.test_family_conversion import divergence, file_weights, log_probabilities
from tests.export.test_family_exports import error, llama_logits, original_logits
from tests.family_models import write_model
from tools.whole_model import WholeModel

CPU = torch.device("cpu")
TOKENS = np.random.default_rng(0).integers(0, 4000, 200).astype(np.int32)
PUBLISHED: dict[str, Any] = {
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "model_type": "granitemoehybrid",
    "attention_bias": False,
    "attention_multiplier": 0.0078125,
    "embedding_multiplier": 12,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "layer_types": ["attention"] * 40,
    "logits_scaling": 8,
    "max_position_embeddings": 131072,
    "num_attention_heads": 16,
    "num_experts_per_tok": 0,
    "num_hidden_layers": 40,
    "num_key_value_heads": 4,
    "num_local_experts": 0,
    "position_embedding_type": "rope",
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000000,
    "shared_intermediate_size": 4096,
    "tie_word_embeddings": True,
    "vocab_size": 100352,
}
"""config.json of granite-4.0-1b, as far as it counts."""
SMALL: dict[str, Any] = {
    "model_type": "granitemoehybrid",
    "attention_multiplier": 0.4,
    "embedding_multiplier": 12.0,
    "logits_scaling": 0.5,
    "residual_multiplier": 0.5,
    "layer_types": ["full_attention"] * 2,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "position_embedding_type": "rope",
    "shared_intermediate_size": 128,
    "mamba_n_heads": 4,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tests must not change it. Its layer types are called as in published files."""
    directory = write_model(tmp_path_factory.mktemp("model") / "tiny", "granite", **SMALL)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "layer_types": ["attention"] * 2}))
    return directory


@pytest.mark.slow
def test_file_is_the_stock_converters(
    model: Path, stock_convert: Callable[[Path, str, str], Path], tmp_path: Path
) -> None:
    export(model, tmp_path / "ours.gguf", "f16")
    ours, theirs = GGUFFile(tmp_path / "ours.gguf"), GGUFFile(stock_convert(model, "f16", "qwen2"))
    assert list(ours.tensors) == list(theirs.tensors)
    for name in ours.tensors:
        assert np.array_equal(ours.raw(name), theirs.raw(name)), name
    # What llama.cpp's granite doesn't read, or has as its default; and one that other Granites have.
    unread = ("ssm.", "expert_", "rope.scaling.finetuned")
    kept = {key: value for key, value in theirs.kv.items() if not key.startswith(tuple(f"granite.{u}" for u in unread))}
    assert kept.pop("granite.attention.head_count_kv") == [2, 2]
    own = dict(ours.kv)
    assert own.pop("granite.attention.head_count_kv") == 2
    assert own.pop("tokenizer.ggml.add_space_prefix") is False
    assert own == kept


def test_logits_are_those_of_transformers(model: Path, tmp_path: Path) -> None:
    export(model, tmp_path / "out.gguf", "f32")
    assert error(llama_logits(tmp_path / "out.gguf", TOKENS), original_logits(model, TOKENS)) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3])
def test_quantized(model: Path, tmp_path: Path, bits: int) -> None:
    convert(model, tmp_path / "out.gguf", Options(bits=bits, calibration_tokens=1280, context=128))
    checkpoint = Checkpoint.open(model)
    family = family_for(checkpoint.config)
    whole = WholeModel(checkpoint, family, file_weights(tmp_path / "out.gguf", family), CPU)
    original = torch.from_numpy(original_logits(model, TOKENS)).log_softmax(-1)
    expected = log_probabilities(whole, TOKENS[None].astype(np.int64))[0]
    found = torch.from_numpy(llama_logits(tmp_path / "out.gguf", TOKENS)).log_softmax(-1)
    assert divergence(expected, found) < 0.01 * divergence(original, expected)


@torch.inference_mode()
def test_whole_model(model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    whole = WholeModel(checkpoint, family_for(checkpoint.config), {}, CPU)
    tokens = torch.from_numpy(TOKENS).long()[None]
    expected = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()(tokens).logits.log_softmax(-1)
    torch.testing.assert_close(whole.log_probabilities(whole.states(tokens)), expected, rtol=1e-4, atol=1e-4)


def test_published_config() -> None:
    family = family_for(granite_config(PUBLISHED))
    assert sum(np.prod(shape) for shape in family.tensor_shapes().values()) == 1_631_750_144
    assert (family.logit_scale, family.residual_scale, family.embedding_scale) == (1 / 8, 0.22, 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": None}, "layer_types must name the kind of all 40 blocks"),
        ({"num_local_experts": 64}, "with attention in every block .* is supported without experts only"),
        ({"position_embedding_type": "nope"}, "position_embedding_type must be rope"),
        ({"shared_intermediate_size": "wide"}, "intermediate_size must be a whole number"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    with pytest.raises(D2QError, match=message):
        family_for(granite_config({**PUBLISHED, **change}))
