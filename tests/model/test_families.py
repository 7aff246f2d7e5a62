"""Test families: how configs are read, which are refused, and row order and rope factors by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from d2q_edge.errors import D2QError
from d2q_edge.model.families import FAMILIES, Family, family_for
from tests.checkpoints import BASE_CONFIG, FAMILY_CONFIG

YARN = {"type": "yarn", "factor": 4.0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def make(name: str, **config: Any) -> Family:
    return family_for({**BASE_CONFIG, **FAMILY_CONFIG[name], **config})


@pytest.mark.parametrize("name", FAMILY_CONFIG)
def test_names_and_shapes(name: str) -> None:
    family = make(name)
    assert family.gguf_arch == name
    shapes = family.tensor_shapes()
    q_rows = 4 * family.head_dim
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (4100, 64)
    assert shapes["model.layers.1.self_attn.q_proj.weight"] == (q_rows, 64)
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (q_rows // 2, 64)
    assert shapes["model.layers.1.self_attn.o_proj.weight"] == (64, q_rows)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (64, 96)
    assert shapes["model.norm.weight"] == (64,)
    assert family.linear_weights()[6] == "model.layers.0.mlp.down_proj.weight"
    assert len(family.linear_weights()) == 14
    assert set(family.linear_weights()) < shapes.keys()
    # 3 outside the blocks; per block 7 matrices and 2 norms, and what makes the family.
    assert len(shapes) == 3 + 2 * (9 + {"llama": 0, "qwen2": 3, "qwen3": 2}[name])


def test_what_makes_each_family() -> None:
    assert make("qwen2").tensor_shapes()["model.layers.0.self_attn.k_proj.bias"] == (32,)
    assert make("qwen3").tensor_shapes()["model.layers.0.self_attn.q_norm.weight"] == (32,)
    biased = make("llama", attention_bias=True, mlp_bias=True).tensor_shapes()
    assert biased["model.layers.0.self_attn.o_proj.bias"] == (64,)
    assert biased["model.layers.0.mlp.gate_proj.bias"] == (96,)
    assert "lm_head.weight" not in make("llama", tie_word_embeddings=True).tensor_shapes()


def test_linear_groups_follow_the_block() -> None:
    family = make("qwen3")
    assert [group.norm for group in family.block_groups(0)] == [
        "input_layernorm",
        None,
        "post_attention_layernorm",
        None,
    ]
    assert family.block_linears(0)[:4] == (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
    )
    assert family.block_prefix(3) == "model.layers.3."


def test_residual_readers_and_writers() -> None:
    attention, mlp = "input_layernorm", "post_attention_layernorm"
    for name in FAMILY_CONFIG:
        assert make(name).residual_readers(0) == {
            "self_attn.q_proj": attention,
            "self_attn.k_proj": attention,
            "self_attn.v_proj": attention,
            "mlp.gate_proj": mlp,
            "mlp.up_proj": mlp,
        }
        assert make(name).residual_writers(0) == ("self_attn.o_proj", "mlp.down_proj")


@pytest.mark.parametrize(
    ("hf_name", "gguf_name"),
    [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("lm_head.weight", "output.weight"),
        ("model.layers.1.input_layernorm.weight", "blk.1.attn_norm.weight"),
        ("model.layers.1.post_attention_layernorm.weight", "blk.1.ffn_norm.weight"),
        ("model.layers.0.self_attn.o_proj.weight", "blk.0.attn_output.weight"),
        ("model.layers.0.self_attn.k_norm.weight", "blk.0.attn_k_norm.weight"),
        ("model.layers.0.mlp.up_proj.weight", "blk.0.ffn_up.weight"),
    ],
)
def test_gguf_names(hf_name: str, gguf_name: str) -> None:
    assert make("qwen3").gguf_name(hf_name) == gguf_name


def test_gguf_name_of_a_bias_and_of_nothing() -> None:
    assert make("qwen2").gguf_name("model.layers.0.self_attn.q_proj.bias") == "blk.0.attn_q.bias"
    with pytest.raises(KeyError):
        make("qwen2").gguf_name("model.layers.0.self_attn.nonsense.weight")


def test_llama_interleaves_the_halves_of_each_head() -> None:
    family = make("llama", hidden_size=12, num_attention_heads=2, num_key_value_heads=1, head_dim=6)
    rows = np.arange(12)
    by_hand = [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert family.export_rows("model.layers.0.self_attn.q_proj.bias", rows).tolist() == by_hand
    packed = np.repeat(rows[:, None], 5, axis=1).astype(np.uint8)
    moved = family.export_rows("model.layers.0.self_attn.q_proj.weight", packed)
    assert moved.dtype == np.uint8
    assert moved.tolist() == [[row] * 5 for row in by_hand]
    assert family.export_rows("model.layers.0.self_attn.k_proj.weight", packed[:6])[:, 0].tolist() == by_hand[:6]
    assert family.export_rows("model.layers.0.self_attn.v_proj.weight", packed) is packed


def test_qwen_keeps_its_rows() -> None:
    rows = np.arange(64)
    assert make("qwen2").export_rows("model.layers.0.self_attn.q_proj.bias", rows) is rows


def test_rope_factors_of_llama_3() -> None:
    family = make("llama", head_dim=128, rope_theta=500000.0, rope_scaling=LLAMA3_ROPE)
    factors = family.extra_tensors()["rope_freqs.weight"]
    assert factors.shape == (64,)
    assert factors.dtype == np.float32
    wavelengths = 2 * np.pi * 500000.0 ** (np.arange(64) / 64)
    assert (factors[wavelengths < 8192 / 4] == 1).all()
    assert (factors[wavelengths > 8192] == 32).all()
    middle = (wavelengths > 8192 / 4) & (wavelengths < 8192)
    # Between, the inverse factor goes linearly in 1 / wavelength from 1 (at 8192 / 4) to 1 / 32 (at 8192).
    smooth = (8192 / wavelengths[middle] - 1) / 3
    assert middle.sum() == 6
    np.testing.assert_allclose(1 / factors[middle], smooth + (1 - smooth) / 32, rtol=1e-5)


def test_no_extra_tensors_without_scaling() -> None:
    assert make("llama").extra_tensors() == {}


def test_rope_settings_in_both_spellings() -> None:
    assert make("qwen3", rope_theta=1e6).rope_theta == 1e6
    new = {"rope_theta": 5e5, "rope_type": "default"}
    assert make("qwen3", rope_theta=None, rope_parameters=new).rope_theta == 5e5


def test_defaults() -> None:
    family = make("llama", num_key_value_heads=None, head_dim=None, rms_norm_eps=None)
    assert (family.num_kv_heads, family.head_dim, family.norm_eps) == (4, 16, 1e-6)
    assert make("qwen3", head_dim=None).head_dim == 128


def test_unsupported_architecture_lists_the_supported_ones() -> None:
    with pytest.raises(D2QError, match=r"MambaForCausalLM isn't supported") as caught:
        family_for({"architectures": ["MambaForCausalLM"]})
    for family in FAMILIES:
        for name in family.architectures:
            assert name in str(caught.value)


@pytest.mark.parametrize("architectures", [None, [], "LlamaForCausalLM"])
def test_no_architecture(architectures: Any) -> None:
    with pytest.raises(D2QError, match="names no architecture"):
        family_for({"architectures": architectures})


@pytest.mark.parametrize(
    ("name", "config", "pattern"),
    [
        ("llama", {"hidden_size": None}, "has no hidden_size"),
        ("llama", {"hidden_size": "64"}, "hidden_size must be a whole number"),
        ("llama", {"hidden_size": True}, "hidden_size must be a whole number"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers must be"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers must be"),
        ("llama", {"hidden_size": 66}, "has no head_dim"),
        ("llama", {"head_dim": 15}, "head_dim must be even"),
        ("llama", {"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ("llama", {"rms_norm_eps": 0}, "rms_norm_eps must be a positive number"),
        ("llama", {"rope_theta": float("nan")}, "rope_theta must be a positive number"),
        ("llama", {"rope_theta": 10**400}, "rope_theta must be a positive number"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "'dynamic' isn't .* up to max_position_embedd"),
        ("qwen2", {"rope_scaling": {"type": "linear"}}, "rope_scaling's factor must be a positive number, not None"),
        ("qwen3", {"rope_scaling": {**YARN, "factor": "4"}}, "rope_scaling's factor must be a positive number"),
        ("qwen3", {"rope_scaling": {**YARN, "beta_fast": 16}}, "beta_fast is 16, but llama.cpp's qwen3 always .* 32;"),
        ("llama", {"rope_scaling": {**YARN, "beta_slow": 2.0}}, "beta_slow is 2, but llama.cpp's llama always .* 1;"),
        ("llama", {"rope_scaling": {**YARN, "mscale": "1"}}, "rope_scaling's mscale must be a positive number"),
        ("llama", {"rope_scaling": {**YARN, "truncate": False}}, "truncate is off, but llama.cpp always rounds"),
        (
            "llama",
            {"rope_scaling": {**YARN, "original_max_position_embeddings": 64.0}},
            "original_max_position_embeddings must be a whole number, not 64.0",
        ),
        (
            "llama",
            {"rope_scaling": YARN, "original_max_position_embeddings": 64},
            "original_max_position_embeddings is 64, but the rotary embeddings are scaled for 512",
        ),
        ("llama", {"rope_scaling": [1]}, "rope_scaling must be an object"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_scaling of type"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"hidden_act": "gelu"}, "activation 'gelu'"),
        ("llama", {"attention_bias": "yes"}, "attention_bias must be true or false"),
        ("llama", {"is_causal": False}, "isn't causal"),
        ("qwen2", {"use_sliding_window": True}, "sliding-window"),
        ("qwen2", {"head_dim": 32}, "num_attention_heads"),
        ("qwen2", {"rope_scaling": LLAMA3_ROPE}, "isn't supported for qwen2 .*: llama.cpp's qwen2 has no"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ("qwen3", {"attention_bias": True}, "attention_bias is set, which llama.cpp's qwen3 doesn't support"),
    ],
)
def test_refused_configs(name: str, config: dict[str, Any], pattern: str) -> None:
    with pytest.raises(D2QError, match=pattern):
        make(name, **config)


@pytest.mark.parametrize("change", [{"factor": "8"}, {"low_freq_factor": 4.0}, {"factor": 0}])
def test_refused_rope_factors(change: dict[str, Any]) -> None:
    with pytest.raises(D2QError, match="rope_scaling's"):
        make("llama", rope_scaling={**LLAMA3_ROPE, **change})
