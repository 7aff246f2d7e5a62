"""Test real configs against transformers, and the refusal of configs that llama.cpp can't express."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from d2q_edge.errors import D2QError
from d2q_edge.model.families import Family, Sublayer, family_for
from d2q_edge.model.families.gemma3 import Gemma3
from d2q_edge.model.families.gemma4 import Gemma4
from d2q_edge.pipeline.type_plan import plan_types
from tests.real_configs import REAL


def make(name: str, **changes: Any) -> Family:
    return family_for({**REAL[name][1], **changes})


@pytest.mark.parametrize("name", REAL)
def test_number_of_parameters(name: str) -> None:
    assert sum(math.prod(shape) for shape in make(name).tensor_shapes().values()) == REAL[name][0]


@pytest.mark.parametrize("name", REAL)
def test_tensors_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    """Compares the first layers only: one more than a period where layers differ."""
    layers = 7 if "gemma-3" in name or "SmolLM3" in name else 2
    # The number of blocks decides which of them share keys.
    layers = REAL[name][1]["num_hidden_layers"] if "gemma-4" in name else layers
    changes: dict[str, Any] = {"num_hidden_layers": layers}
    changes |= {key: REAL[name][1][key][:layers] for key in ("layer_types", "no_rope_layers") if key in REAL[name][1]}
    family = make(name, **changes)
    (tmp_path / "config.json").write_text(json.dumps(family.config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if family.tied_embeddings:
        assert model.config.tie_word_embeddings
        del expected[f"{family.head}.weight"]
    assert dict(family.tensor_shapes()) == expected
    block = model.model.layers[0]
    family.adapt_block(0, block)
    for sublayer in family.block_sublayers(0):
        for module in (sublayer.module, sublayer.norm, sublayer.output_norm):
            assert module is None or block.get_submodule(module)
    scale = getattr(model.model.embed_tokens, "scalar_embed_scale", getattr(model.model, "embedding_multiplier", 1.0))
    assert family.embedding_scale == pytest.approx(scale)


@pytest.mark.parametrize("name", REAL)
def test_keys_that_llama_cpp_reads(tmp_path: Path, name: str) -> None:
    family = make(name)
    writer = gguf.GGUFWriter(tmp_path / "unused", family.gguf_arch)
    family.add_metadata(writer, 1)
    keys = {key.partition(".")[2]: value.value for key, value in writer.kv_data[0].items()}
    assert keys["block_count"] == REAL[name][1]["num_hidden_layers"]
    assert keys["embedding_length"] == REAL[name][1]["hidden_size"]
    heads = keys["attention.head_count_kv"]
    # A list where blocks without attention have none.
    counts = {REAL[name][1]["num_key_value_heads"], REAL[name][1].get("num_global_key_value_heads", 0)} - {0}
    assert set(heads if isinstance(heads, list) else [heads]) - {0} == counts
    rope = REAL[name][1].get("rope_parameters") or REAL[name][1]
    rope = rope.get("full_attention", rope)
    assert keys["rope.freq_base"] == rope.get("rope_theta", 10000.0)


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize(
    "keys",
    [
        ("num_key_value_heads",),
        ("rope_theta", "rope_local_base_freq"),
        ("rms_norm_eps", "norm_eps"),
        ("sliding_window",),
    ],
    ids=lambda keys: keys[0],
)
def test_defaults_are_those_of_transformers(tmp_path: Path, name: str, keys: tuple[str, ...]) -> None:
    entries = {key: value for key, value in REAL[name][1].items() if key not in keys}
    (tmp_path / "config.json").write_text(json.dumps(entries))
    config = AutoConfig.from_pretrained(tmp_path)
    config.allow_global_per_layer_attribute_access = True  # those of sliding-window layers, in Gemma 4
    ropes = config.rope_parameters
    full, sliding = ropes.get("full_attention", ropes), ropes.get("sliding_attention", ropes)
    if entries["num_attention_heads"] % config.num_key_value_heads:
        with pytest.raises(D2QError, match="multiple of num_key_value_heads"):
            family_for(entries)
        return
    family = family_for(entries)
    assert family.num_kv_heads == config.num_key_value_heads
    assert family.head_dim == getattr(config, "head_dim", family.hidden_size // family.num_heads)
    assert family.norm_eps == getattr(config, family.norm_eps_key)
    assert family.rope_theta == full["rope_theta"]
    assert family.tied_embeddings == config.tie_word_embeddings
    windowed = not hasattr(config, "layer_types") or "sliding_attention" in config.layer_types
    if name != "Llama-2-7b" and family.model_type != "llama":
        assert family.sliding_window(0) == (getattr(config, "sliding_window", None) if windowed else None)
    if isinstance(family, Gemma3 | Gemma4):
        assert family.sliding_rope_theta == sliding["rope_theta"]


def test_types_of_real_models() -> None:
    """All widths fit our block sizes; those that 256 doesn't divide cost the documented bits."""
    plans = {name: plan_types(make(name), 2) for name in REAL}
    assert [name for name, plan in plans.items() if plan.fallbacks] == []
    narrow = {
        name: plan.linear_bits_per_weight for name, plan in plans.items() if plan.linear_bits_per_weight != 2.3125
    }
    assert narrow.keys() == {"Qwen2.5-0.5B", "SmolLM2-135M", "SmolLM2-360M", "gemma-3-270m", "gemma-3-1b-it"}
    # Down is as wide as a multiple of 256 in all of them: a quarter of SmolLM2's weights. Gemma's o is, too.
    assert narrow["SmolLM2-135M"] == narrow["SmolLM2-360M"] == 2.5 - 0.1875 / 4
    wide = 640 * 2048 + 640 * 1024
    narrow_weights = 640 * (1024 + 2 * 256) + 2 * 640 * 2048
    assert narrow["gemma-3-270m"] == pytest.approx(2.5 - 0.1875 * wide / (wide + narrow_weights))


def test_settings_of_some_models() -> None:
    assert make("SmolLM2-135M").head_dim == make("SmolLM2-360M").head_dim == 64
    gemma = make("gemma-3-1b-it")
    assert (gemma.tied_embeddings, gemma.norm_offset, gemma.can_rotate) == (True, 1.0, False)
    assert gemma.sublayers[1] == Sublayer("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    assert make("SmolLM3-3B").tied_embeddings
    assert make("Phi-4-mini").linear_shape(0, "self_attn.qkv_proj") == (5120, 3072)
    assert make("Phi-3-mini-4k").can_rotate and make("Phi-3-mini-4k").extra_tensors() == {}


def test_what_is_noted() -> None:
    noted = [name for name in REAL if make(name).notes]
    assert noted == ["Phi-3-mini-4k"]
    assert make("Ministral-3-3B", sliding_window=4096).notes[0].startswith("the model attends to the last 4096 tokens")
    assert make("Mistral-7B-v0.3", sliding_window=4096).notes == (
        "the model attends to the last 4096 tokens, llama.cpp's llama to all of them: in texts of more than 4096 "
        "tokens it isn't the same model",
    )
    config = {key: value for key, value in REAL["Mistral-7B-v0.3"][1].items() if key != "sliding_window"}
    assert "last 4096 tokens" in family_for(config).notes[0]


def test_columns_of_o_and_down_come_from_rows_of_fused_layers() -> None:
    family = make("Phi-3-mini-4k", hidden_size=24, num_attention_heads=6, num_key_value_heads=2)
    # 24 rows of q, 8 of k, then v: heads of 4, each serving 3 heads of q.
    assert family.absorber_rows(0, "self_attn.qkv_proj").tolist() == [32, 33, 34, 35] * 3 + [36, 37, 38, 39] * 3
    family = make("Phi-3-mini-4k", intermediate_size=3)
    assert family.absorber_rows(0, "mlp.gate_up_proj").tolist() == [3, 4, 5]


def test_gemmas_norms_get_their_one_in_the_file() -> None:
    family = make("gemma-3-1b-it")
    weight = np.array([0.5, -0.25], np.float32)
    prefix = "model.layers.3."
    norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    for name in (*(prefix + norm for norm in (*norms, "self_attn.q_norm", "self_attn.k_norm")), "model.norm"):
        assert family.export_values(f"{name}.weight", weight).tolist() == [1.5, 0.75]
        assert family.export_values(f"{name}.bias", weight) is weight
    for name in (f"{prefix}self_attn.q_proj", "model.embed_tokens"):
        assert family.export_values(f"{name}.weight", weight) is weight
    assert make("Qwen3-8B").export_values("model.norm.weight", weight) is weight


@pytest.mark.parametrize(
    ("name", "changes", "pattern"),
    [
        ("Llama-3.2-1B", {"model_type": "qwen3"}, "contradicts itself: .* LlamaForCausalLM has the model_type 'llama'"),
        ("Llama-3.2-1B", {"rope_parameters": {"rope_type": "default"}}, "both rope_parameters and rope_scaling"),
        ("Llama-3.2-1B", {"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ("Mistral-7B-v0.3", {"sliding_window": "all"}, "sliding_window must be a whole number"),
        ("Mistral-7B-v0.3", {"layer_types": ["sliding_attention"] * 32}, "sliding-window attention, .* llama doesn't"),
        ("SmolLM3-3B", {"no_rope_layers": [1] * 36}, "no_rope_layers must leave out .* every 4th layer"),
        ("SmolLM3-3B", {"no_rope_layers": None, "no_rope_layer_interval": 6}, "no_rope_layers must leave out"),
        ("SmolLM3-3B", {"no_rope_layers": 5}, "no_rope_layers must leave out"),
        ("SmolLM3-3B", {"mlp_bias": True}, "mlp_bias is set, which llama.cpp's smollm3 doesn't support"),
        ("gemma-3-1b-it", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "gemma3 has no such scaling"),
        ("Phi-3-mini-4k", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "phi3 has no such scaling"),
        ("gemma-3-1b-it", {"hidden_activation": "silu"}, "activation 'silu' isn't supported, only gelu_pytorch_tanh"),
        ("gemma-3-1b-it", {"sliding_window_pattern": 4}, "layer_types must make every 6th layer"),
        ("gemma-3-270m", {"layer_types": ["full_attention"] * 18}, "layer_types must make every 6th layer"),
        ("gemma-3-1b-it", {"sliding_window": 0}, "sliding_window must be a whole number"),
        ("gemma-3-1b-it", {"query_pre_attn_scalar": 168}, "query_pre_attn_scalar is 168, but .* computes with 256"),
        ("gemma-3-1b-it", {"num_hidden_layers": 62}, "query_pre_attn_scalar is 256, but .* computes with 288"),
        ("gemma-3-1b-it", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is set"),
        ("gemma-3-1b-it", {"use_bidirectional_attention": True}, "use_bidirectional_attention is set"),
        ("gemma-3-1b-it", {"rope_parameters": [1]}, "rope_parameters must be an object"),
        ("gemma-3-1b-it", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters must be an object"),
        ("gemma-3-1b-it", {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling's factor must be a positive"),
        (
            "gemma-3-1b-it",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "of the sliding-window layers aren't supported",
        ),
        ("gemma-4-31B", {"enable_moe_block": True}, "of Gemma 4 only models without experts are supported"),
        ("gemma-4-31B", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention isn't supported, except"),
        ("gemma-4-31B", {"attention_bias": True}, "attention_bias is set, which llama.cpp's gemma4 doesn't support"),
        (
            "gemma-4-31B",
            {"layer_types": ["full_attention"] * 59},
            "layer_types must name the attention of all 60 blocks",
        ),
        ("gemma-4-31B", {"layer_types": 6}, "layer_types must name the attention of all 60 blocks"),
        (
            "gemma-4-31B",
            {"layer_types": ["sliding_attention"] * 60},
            "the last of the layer_types must be full_attention",
        ),
        ("gemma-4-31B", {"num_global_key_value_heads": 5}, "32 heads don't suit 5 key-value heads of 512 channels"),
        ("gemma-4-31B", {"per_layer_config": {"0": {"head_dim": 512}}}, "per_layer_config must say the same of all"),
        ("gemma-4-31B", {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "gemma4 has no such scaling"),
        (
            "gemma-4-31B",
            {"rope_parameters": {"full_attention": {"rope_type": "proportional", "factor": 2.0}}},
            "partial_rotary_factor must be at most 1, and its factor 1",
        ),
        ("gemma-4-31B", {"final_logit_softcapping": -1}, "final_logit_softcapping must be a positive number"),
        ("gemma-4-E2B", {"vocab_size_per_layer_input": 1000}, "vocab_size_per_layer_input must be vocab_size"),
        ("gemma-4-E2B", {"num_kv_shared_layers": 35}, "num_kv_shared_layers must be a whole number from 1 to 34"),
        ("gemma-4-E2B", {"num_kv_shared_layers": 19}, "so must the last one of a block with keys of its own"),
        ("Phi-3-mini-4k", {"hidden_size": 3200, "head_dim": 96}, "num_attention_heads . head_dim = hidden_size"),
        ("Phi-3-mini-4k", {"partial_rotary_factor": 0.01}, "partial_rotary_factor of 0.01 doesn't suit heads of 96"),
        ("Phi-3-mini-4k", {"partial_rotary_factor": 2}, "partial_rotary_factor must be at most 1"),
        ("Phi-3-mini-4k", {"original_max_position_embeddings": 1}, "original_max_position_embeddings must be"),
        ("Phi-4-mini", {"lm_head_bias": True}, "lm_head_bias is set"),
        ("Phi-4-mini", {"partial_rotary_factor": 0.5}, "long_factor must have 32 numbers"),
        ("Phi-3-mini-128k", {"max_position_embeddings": "128k"}, "max_position_embeddings must be"),
        ("OLMo-2-1B", {"tie_word_embeddings": True}, "tie_word_embeddings is set, which llama.cpp's olmo2 doesn't"),
        ("OLMo-2-1B", {"head_dim": 64}, "olmo2 models need num_attention_heads . head_dim = hidden_size"),
        ("Olmo-3-7B", {"layer_types": ["full_attention"] * 31}, "layer_types must name the attention of all 32 layers"),
        ("Olmo-3-7B", {"layer_types": ["chunked_attention"] * 32}, "each one of sliding_attention, full_attention"),
        ("Olmo-3-7B", {"rope_theta": 10000}, "layers with a sliding window have another rope_theta than those without"),
        (
            "Olmo-3-7B",
            {"rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}},
            "of the sliding-window layers",
        ),
        ("Ministral-3-3B", {"rope_parameters": {"rope_type": "default"}}, "'default' isn't supported for mistral3"),
        (
            "Ministral-3-3B",
            {"rope_parameters": {**REAL["Ministral-3-3B"][1]["rope_parameters"], "llama_4_scaling_beta": None}},
            "llama_4_scaling_beta must be a positive number, not None",
        ),
        ("Granite-3.3-2B", {"residual_multiplier": 0}, "residual_multiplier must be a positive number, not 0"),
        ("Granite-3.3-2B", {"head_dim": 128}, "granite models need num_attention_heads . head_dim = hidden_size"),
        ("ERNIE-4.5-0.3B", {"use_bias": True}, "use_bias is set, which llama.cpp's ernie4_5 doesn't support"),
        ("LFM2-350M", {"conv_bias": True}, "conv_bias is set, which llama.cpp's lfm2 doesn't support"),
        ("LFM2-350M", {"layer_types": ["conv"] * 15}, "layer_types must name the kind of all 16 blocks"),
        ("LFM2-350M", {"full_attn_idxs": 5}, "layer_types must name the kind of all 16 blocks"),
        (
            "LFM2-350M",
            {"block_ffn_dim_multiplier": "1"},
            "block_ffn_dim_multiplier must be a positive number",
        ),
        ("LFM2-350M", {"block_ffn_dim_multiplier": 1e-9}, "block_ffn_dim_multiplier makes no sense"),
        ("Qwen3.5-0.8B", {"linear_key_head_dim": 64}, "qwen35 needs linear_key_head_dim = linear_value_head_dim"),
        ("Qwen3.5-0.8B", {"linear_num_value_heads": 24}, "linear_num_value_heads to be a multiple of"),
        (
            "Qwen3.5-0.8B",
            {"linear_key_head_dim": 1, "linear_value_head_dim": 1},
            "linear_num_value_heads . linear_value_head_dim must be a multiple of 32",
        ),
        ("Qwen3.5-0.8B", {"layer_types": ["mamba"] * 24}, "each one of linear_attention, full_attention"),
        ("Qwen3.5-0.8B", {"rope_parameters": {"partial_rotary_factor": 0.001}}, "0.001 doesn't suit heads of 256"),
        ("Qwen3.5-0.8B", {"rope_parameters": {"mrope_section": [11]}}, "mrope_section must be three whole numbers"),
        ("Qwen3.5-0.8B", {"rope_parameters": {"mrope_section": [-1, 1, 1]}}, "mrope_section must not be negative"),
        (
            "Phi-3-mini-128k",
            {"rope_scaling": {**REAL["Phi-3-mini-128k"][1]["rope_scaling"], "attention_factor": 1.5}},
            "attention_factor is 1.5, but llama.cpp computes with 1.19",
        ),
        ("Phi-3-mini-128k", {"rope_scaling": {"type": "longrope", "long_factor": "1"}}, "long_factor must have 48"),
    ],
)
def test_refused_configs(name: str, changes: dict[str, Any], pattern: str) -> None:
    with pytest.raises(D2QError, match=pattern) as caught:
        make(name, **changes)
    assert "\n" not in str(caught.value)


def test_value_heads_of_delta_net_by_hand() -> None:
    """Two key heads with three value heads each, of two rows: llama.cpp wants the first ones of all key heads first."""
    family = make(
        "Qwen3.5-0.8B", linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=16,
        linear_value_head_dim=16,
    )  # fmt: skip
    prefix = "model.layers.0.linear_attn"
    assert family.export_rows(f"{prefix}.A_log", np.arange(6)).tolist() == [0, 3, 1, 4, 2, 5]
    rows = np.asarray(family.export_rows(f"{prefix}.in_proj_qkv.weight", np.arange(4 * 16 + 6 * 16)))
    assert rows[:64].tolist() == list(range(64)), "q and k stay"
    assert rows[64::16].tolist() == [64 + 16 * head for head in (0, 3, 1, 4, 2, 5)]
    columns = family.arranged(f"{prefix}.out_proj.weight", torch.arange(96)[None])
    assert columns[0, ::16].tolist() == [16 * head for head in (0, 3, 1, 4, 2, 5)]
    # One scale for a channel of all heads, which DeltaNet's norm absorbs.
    assert family.absorber_rows(0, "linear_attn.norm").tolist() == list(range(16)) * 6
    assert family.export_rows("model.layers.3.self_attn.q_proj.weight", rows) is rows


def test_gemma_of_62_layers_scales_by_the_width_of_a_head() -> None:
    config = {"num_hidden_layers": 62, "hidden_size": 5376, "num_attention_heads": 32, "head_dim": 128}
    assert make("gemma-3-1b-it", **config, query_pre_attn_scalar=168).num_layers == 62


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)
KEYS = sorted({key for _, config in REAL.values() for key in config} | {"rope_parameters", "quantization_config"})


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(REAL)), st.dictionaries(st.sampled_from(KEYS), ANYTHING, min_size=1, max_size=3))
@pytest.mark.slow
def test_random_values_are_refused_or_harmless(name: str, lies: dict[str, Any]) -> None:
    try:
        family = make(name, **{"num_hidden_layers": 2, "layer_types": None, "no_rope_layers": None, **lies})
    except D2QError as error:
        assert "\n" not in str(error)
        return
    if family.num_layers < 100:
        assert family.tensor_shapes()
    writer = gguf.GGUFWriter("unused", family.gguf_arch)
    family.add_metadata(writer, 1)
