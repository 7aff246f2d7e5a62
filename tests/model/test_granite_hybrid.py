"""Test Granite 4 hybrid's config: the published models' weights, Mamba-2's and the experts' layers, refusals."""

from __future__ import annotations

import json
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
from tools.phone_table import MODELS

PUBLISHED: dict[str, dict[str, Any]] = {
    name: config for name, config in json.loads(MODELS.read_text("utf-8")).items() if name.startswith("Granite-4.0-H")
}
SMALL: dict[str, Any] = {
    **PUBLISHED["Granite-4.0-H-Tiny"],
    "hidden_size": 4096,
    "intermediate_size": 768,
    "shared_intermediate_size": 1536,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 72,
    "num_experts_per_tok": 10,
    "mamba_n_heads": 128,
}
"""Granite-4.0-H-Small."""


def make(**changes: Any) -> Family:
    return family_for({**PUBLISHED["Granite-4.0-H-Tiny"], **changes})


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [
        (PUBLISHED["Granite-4.0-H-Micro"], 3_191_396_096, 3_191_396_096),
        (PUBLISHED["Granite-4.0-H-Tiny"], 6_939_037_248, 1_465_470_528),
        (SMALL, 32_207_337_984, 8_803_121_664),
    ],
    ids=["micro", "tiny", "small"],
)
def test_published_models(config: dict[str, Any], total: int, active: int) -> None:
    """The hub has 3B, 7B with 1B active, 32B with 9B active."""
    family = family_for(config)
    parameters, outside, one_expert, _ = family.parameters()
    assert (parameters, outside + family.experts_per_token * one_expert) == (total, active)
    assert plan_types(family, 2).fallbacks == []


def test_layers() -> None:
    family = make()
    # Gate and x of 3072, B and C of 128 each, a time step for each of 48 heads.
    assert family.linear_shape(0, "mamba.in_proj") == (2 * 3072 + 2 * 128 + 48, 1536)
    assert family.block_linears(0)[:2] == ("mamba.in_proj", "mamba.out_proj")
    assert family.block_linears(5)[3] == "self_attn.o_proj"
    assert [group.linears for group in dense_groups(family, 0)[2:]] == [
        ("shared_mlp.gate_proj", "shared_mlp.up_proj"),
        ("shared_mlp.down_proj",),
    ]
    assert family.absorber_rows(0, "mamba.norm").tolist() == list(range(3072))
    assert family.state_elements(0) == 3 * (3072 + 2 * 128) + 3072 * 128 and family.state_elements(5) == 0
    assert family.export_shape("model.layers.0.mamba.D") == (48, 1)
    assert family.export_shape("model.layers.0.mamba.norm.weight") == (1, 3072)
    assert family.gguf_name("model.layers.0.shared_mlp.down_proj.weight") == "blk.0.ffn_down_shexp.weight"


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"layer_types": ["mamba"]}, "layer_types must name the kind of all 40 blocks, each one of mamba, attention"),
        ({"position_embedding_type": "rope"}, "position_embedding_type is set"),
        ({"mamba_expand": 4}, "mamba_expand isn't 2"),
        ({"mamba_d_head": 32}, "mamba_n_heads must be a multiple of mamba_n_groups, and times mamba_d_head be twice"),
        ({"mamba_n_groups": 5}, "mamba_n_heads must be a multiple of mamba_n_groups"),
        ({"mamba_conv_bias": False}, "mamba_conv_bias is false"),
        ({"mamba_proj_bias": True}, "mamba_proj_bias is set"),
        ({"time_step_limit": [0.0, 0.1]}, "time_step_limit is set"),
        ({"num_local_experts": 0}, r"needs shared_intermediate_size \(1024\) to be intermediate_size \(512\)"),
    ],
)
def test_refusals(changes: dict[str, Any], pattern: str) -> None:
    with pytest.raises(D2QError, match=pattern):
        make(**changes)


def test_other_spellings() -> None:
    assert make(mamba_d_head="auto", time_step_limit=[0.0, {"__float__": "Infinity"}]).linear_shape(0, "mamba.out_proj")


def test_files_with_a_rotary_embedding_are_refused(every_model: dict[str, Path], tmp_path: Path) -> None:
    export(every_model["granite-hybrid"], tmp_path / "out.gguf", "f32", verify=False)
    rotary = changed(tmp_path / "out.gguf", tmp_path / "rope.gguf", {"granitehybrid.rope.scaling.finetuned": True})
    with pytest.raises(D2QError, match="its attention has a rotary embedding"):
        Checkpoint.open(rotary)


def test_gpt_oss_is_refused_with_its_reason() -> None:
    with pytest.raises(D2QError, match=r"GptOssForCausalLM isn't supported: its experts have biases and limit"):
        family_for({"architectures": ["GptOssForCausalLM"]})
