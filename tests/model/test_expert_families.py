"""Test Mixture-of-Experts families: names, shapes, refusals, and the parameter counts of real models."""

from __future__ import annotations

from typing import Any

import pytest

from d2q_edge.errors import D2QError
from d2q_edge.model.families import Family, LinearGroup, family_for
from d2q_edge.model.families.experts import dense_groups, solved_groups
from d2q_edge.pipeline.type_plan import choosable, plan_types, rounding_types
from tests.checkpoints import BASE_CONFIG, EXPERTS_CONFIG

REAL: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "decoder_sparse_step": 1,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "OLMoE-1B-7B-0924": {
        "architectures": ["OlmoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "clip_qkv": None,
        "eos_token_id": 50279,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 1024,
        "max_position_embeddings": 4096,
        "model_type": "olmoe",
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 16,
        "num_key_value_heads": 16,
        "output_router_logits": False,
        "pad_token_id": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 50304,
    },
}
"""config.json of models on the hub, as published."""


def make(name: str, **config: Any) -> Family:
    return family_for({**BASE_CONFIG, **EXPERTS_CONFIG[name], **config})


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("Qwen3-30B-A3B", 30_532_122_624, 3_353_032_704), ("OLMoE-1B-7B-0924", 6_919_161_856, 1_282_017_280)],
)
def test_real_models(name: str, total: int, active: int) -> None:
    """The totals are those on the hub (30.5B and 6.92B); 3.3B and 1.3B are active."""
    family = family_for(REAL[name])
    parameters, outside, one_expert, experts = family.parameters()
    assert parameters == total == outside + experts * one_expert
    assert outside + family.experts_per_token * one_expert == active


def test_names_and_shapes() -> None:
    family = make("qwen3moe")
    shapes = family.tensor_shapes()
    assert shapes["model.layers.1.mlp.experts.7.gate_proj.weight"] == (64, 64)
    assert make("olmoe").tensor_shapes()["model.layers.0.mlp.experts.5.down_proj.weight"] == (64, 96)
    assert make("olmoe").tensor_shapes()["model.layers.0.mlp.experts.5.up_proj.weight"] == (96, 64)
    assert shapes["model.layers.0.mlp.gate.weight"] == (8, 64)
    assert shapes["model.layers.0.self_attn.q_norm.weight"] == (32,)
    assert make("olmoe").tensor_shapes()["model.layers.0.self_attn.k_norm.weight"] == (64,)
    # 3 outside the blocks; per block 4 matrices and 4 norms of attention and mlp, a router and the experts.
    assert len(shapes) == 3 + 2 * (9 + 3 * 8)
    assert len(family.linear_weights()) == 2 * (4 + 3 * 8)
    assert not any("mlp.gate." in name for name in family.linear_weights())


def test_linear_groups() -> None:
    family = make("qwen3moe")
    inputs, output, experts, *downs = family.block_groups(0)
    assert inputs.norm == "input_layernorm"
    assert output.absorber == "self_attn.v_proj"
    assert experts.norm == "post_attention_layernorm"
    assert len(experts.linears) == 16
    layout = family.block_experts(0)
    assert layout is not None and layout.router in family.block_routers(0)
    assert layout.linears(3) == tuple(f"mlp.experts.3.{part}_proj" for part in ("gate", "up", "down"))
    assert set(layout.linears(3)[:2]) < set(experts.linears)
    assert dense_groups(family, 0) == (inputs, output)
    assert solved_groups(family, 0)[2:4] == (LinearGroup(experts.norm, layout.linears(0)[:2]), downs[0])
    assert len(solved_groups(family, 0)) == 2 + 2 * 8
    assert [(group.linears, group.absorber) for group in downs] == [
        ((f"mlp.experts.{i}.down_proj",), f"mlp.experts.{i}.up_proj") for i in range(8)
    ]
    assert family.residual_readers(0)["mlp.gate"] == "post_attention_layernorm"
    assert family.residual_readers(0)["mlp.experts.7.up_proj"] == "post_attention_layernorm"
    assert family.residual_writers(0) == ("self_attn.o_proj", *(f"mlp.experts.{i}.down_proj" for i in range(8)))
    assert family.absorber_rows(0, "mlp.experts.2.up_proj").tolist() == list(range(64))
    assert family.num_experts == 8, "one model's linear_groups are not another's"
    assert len(make("olmoe").block_groups(0)) == 3 + 6


def test_gguf_names() -> None:
    family = make("olmoe")
    assert family.gguf_name("model.layers.1.mlp.experts.5.down_proj.weight") == "blk.1.ffn_down_exps.weight"
    assert family.gguf_name("model.layers.1.mlp.gate.weight") == "blk.1.ffn_gate_inp.weight"
    assert family.gguf_name("model.layers.1.self_attn.q_norm.weight") == "blk.1.attn_q_norm.weight"
    assert family.stays_float("model.layers.1.mlp.gate.weight")
    assert not family.stays_float("model.layers.1.mlp.experts.1.gate_proj.weight")
    assert not family.stays_float("lm_head.weight")


def test_a_stack_has_one_type() -> None:
    """Also in a mixture of types; here the sensitivities call for one more bit in some stacks."""
    family = make("qwen3moe", hidden_size=256, moe_intermediate_size=256)
    groups = choosable(family)
    assert list(groups)[4:7] == [f"model.layers.0.mlp.experts.{part}_proj.weight" for part in ("gate", "up", "down")]
    assert len(groups) == 2 * 7
    assert sorted(name for parts in groups.values() for name in parts) == sorted(family.linear_weights())
    sensitivity = {name: float(place) for place, name in enumerate(rounding_types(family))}
    assert sensitivity.keys() == groups.keys()
    plan = plan_types(family, 2.8, sensitivity=sensitivity)
    assert list(plan.linears) == family.linear_weights()
    for parts in groups.values():
        assert len({plan.linears[part] for part in parts}) == 1
    assert len(set(plan.linears.values())) > 1
    assert 2.6 < plan.linear_bits_per_weight <= 2.8


@pytest.mark.parametrize(
    ("name", "config", "pattern"),
    [
        ("qwen3moe", {"mlp_only_layers": [0]}, "make some blocks dense"),
        ("qwen3moe", {"decoder_sparse_step": 2}, "make some blocks dense"),
        ("qwen3moe", {"norm_topk_prob": False}, r"norm_topk_prob is false, .* qwen3moe always .* true"),
        ("qwen3moe", {"norm_topk_prob": None}, "norm_topk_prob is false"),
        ("olmoe", {"norm_topk_prob": True}, r"norm_topk_prob is true, .* olmoe always .* false"),
        ("qwen3moe", {"moe_intermediate_size": None}, "has no moe_intermediate_size"),
        ("qwen3moe", {"num_experts": None}, "has no num_experts"),
        ("qwen3moe", {"num_experts": 0}, "num_experts must be a whole number"),
        ("qwen3moe", {"num_experts": 5000}, "from 1 to 1024"),
        ("qwen3moe", {"num_local_experts": 4}, "contradict each other"),
        ("qwen3moe", {"num_experts": 1024, "num_hidden_layers": 5000}, "5000 blocks of 1024 experts, more than any"),
        ("qwen3moe", {"num_experts_per_tok": 9}, "num_experts_per_tok must be a whole number from 1 to 8"),
        ("qwen3moe", {"attention_bias": True}, "attention_bias"),
        ("qwen3moe", {"use_sliding_window": True}, "sliding-window"),
        ("olmoe", {"clip_qkv": 8.0}, "doesn't clip q, k and v"),
        (
            "olmoe",
            {"num_key_value_heads": 2},
            r"as wide as hidden_size \(64\).* 4 query heads and 2 key-value heads of 16",
        ),
        ("olmoe", {"head_dim": 32}, "as wide as hidden_size"),
        ("olmoe", {"tie_word_embeddings": True}, "tie_word_embeddings is set, which llama.cpp's olmoe doesn't support"),
    ],
)
def test_refused_configs(name: str, config: dict[str, Any], pattern: str) -> None:
    with pytest.raises(D2QError, match=pattern):
        make(name, **config)


def test_the_other_name_of_num_experts() -> None:
    assert make("qwen3moe", num_experts=None, num_local_experts=4).num_experts == 4
