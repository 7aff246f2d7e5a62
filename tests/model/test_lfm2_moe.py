"""Test LFM2-MoE's config: the published model's weights, which blocks have experts, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from d2q_edge.errors import D2QError
from d2q_edge.export.model_file import export
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import Family, family_for
from d2q_edge.model.families.experts import dense_groups
from d2q_edge.pipeline.type_plan import plan_types
from tests.gguf_files import changed

PUBLISHED: dict[str, Any] = {
    "architectures": ["Lfm2MoeForCausalLM"],
    "bos_token_id": 1,
    "conv_L_cache": 3,
    "conv_bias": False,
    "eos_token_id": 7,
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "layer_types": ["full_attention" if index in (2, 6, 10, 14, 18, 21) else "conv" for index in range(24)],
    "max_position_embeddings": 128000,
    "model_type": "lfm2_moe",
    "moe_intermediate_size": 1792,
    "norm_eps": 1e-05,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_dense_layers": 2,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "rope_theta": 1000000.0,
    "routed_scaling_factor": 1.0,
    "use_expert_bias": True,
    "vocab_size": 65536,
}
"""config.json of LFM2-8B-A1B, as far as it counts."""


def make(**changes: Any) -> Family:
    return family_for({**PUBLISHED, **changes})


def test_published_model() -> None:
    """8.3 billion weights; 1.5 billion, as the hub has it, are active: 1.56 with the embeddings."""
    family = make()
    total, outside, one_expert, experts = family.parameters()
    assert total == outside + experts * one_expert == 8_339_930_560
    assert outside + family.experts_per_token * one_expert == 1_557_740_992
    plan = plan_types(family, 2)
    assert plan.fallbacks == [] and plan.linear_bits_per_weight == 2.3125


def test_first_blocks_are_dense() -> None:
    family = make()
    assert [family.block_experts(index) is None for index in (0, 1, 2, 23)] == [True, True, False, False]
    assert family.block_linears(1)[-3:] == ("feed_forward.w1", "feed_forward.w3", "feed_forward.w2")
    assert dense_groups(family, 1) == family.block_groups(1)
    assert len(dense_groups(family, 2)) == 2 and len(family.block_groups(2)) == 2 + 1 + 32
    assert family.block_routers(1) == {} and "feed_forward.gate" in family.residual_readers(2)
    assert "feed_forward.expert_bias" not in family.block_constants(1)
    assert len(family.stacks) == 3 * 22
    assert family.gguf_name("model.layers.2.feed_forward.expert_bias") == "blk.2.exp_probs_b.bias"
    assert family.gguf_name("model.layers.2.feed_forward.experts.31.w2.weight") == "blk.2.ffn_down_exps.weight"
    assert make(num_dense_layers=0).block_experts(0) is not None
    omitted = ("num_dense_layers", "norm_topk_prob")
    defaults = family_for({key: value for key, value in PUBLISHED.items() if key not in omitted})
    assert defaults.block_experts(1) is None and defaults.block_experts(2) is not None


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"num_dense_layers": 24}, "num_dense_layers must be a whole number from 1 to 23"),
        ({"norm_topk_prob": False}, "norm_topk_prob is false, but llama.cpp's lfm2moe always computes as if it were"),
        ({"use_expert_bias": False}, "use_expert_bias is false"),
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor isn't 1"),
        ({"conv_bias": True}, "conv_bias is set"),
        ({"moe_intermediate_size": None}, "has no moe_intermediate_size"),
        ({"layer_types": ["conv"]}, "layer_types must name the kind of all 24 blocks"),
    ],
)
def test_refusals(changes: dict[str, Any], pattern: str) -> None:
    with pytest.raises(D2QError, match=pattern):
        make(**changes)


def test_other_routers_are_refused(every_model: dict[str, Path], tmp_path: Path) -> None:
    export(every_model["lfm2moe"], tmp_path / "out.gguf", "f32", verify=False)
    softmax = changed(tmp_path / "out.gguf", tmp_path / "softmax.gguf", {"lfm2moe.expert_gating_func": 1})
    with pytest.raises(D2QError, match="its experts aren't chosen by a sigmoid"):
        Checkpoint.open(softmax)


def test_bias_of_experts_is_not_quantized(every_model: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(every_model["lfm2moe"])
    assert checkpoint.tensor("model.layers.1.feed_forward.expert_bias").abs().min() > 0.01, "it would show"
    assert family_for(checkpoint.config).stays_float("model.layers.1.feed_forward.expert_bias")
