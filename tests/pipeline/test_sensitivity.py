"""Sensitivities against whole models in transformers, one for each layer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from d2q_edge.formats.tensor_types import BY_NAME
from d2q_edge.model.blocks import BlockRunner
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from d2q_edge.pipeline import sensitivity
from d2q_edge.pipeline.sensitivity import choose_windows, measure
from d2q_edge.pipeline.type_plan import rounding_types
from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.rtn import round_layer
from tools.whole_model import WholeModel

WINDOWS = np.random.default_rng(0).integers(0, 4000, (3, 16))


def runner_of(model: Path) -> BlockRunner:
    checkpoint = Checkpoint.open(model)
    return BlockRunner(checkpoint, family_for(checkpoint.config), torch.device("cpu"))


@torch.inference_mode()
def slow(model: Path, types: dict[str, str]) -> dict[str, float]:
    """Every layer alone, in the whole model, in float64 from the logits on."""
    whole: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokens = torch.from_numpy(WINDOWS)
    expected = whole(tokens).logits.double().log_softmax(-1)
    found = {}
    for name, kind in types.items():
        layer = whole.get_submodule(name.removesuffix(".weight"))
        original = layer.weight.clone()
        layer.weight.copy_(round_layer(original, CodebookSearch(BY_NAME[kind])).weights)
        other = whole(tokens).logits.double().log_softmax(-1)
        found[name] = float((expected.exp() * (expected - other)).sum(-1).mean())
        layer.weight.copy_(original)
    return found


@pytest.mark.parametrize(
    ("family", "config", "memory"),
    [
        ("qwen3", {"tie_word_embeddings": True}, 2**31),
        ("llama", {"hidden_size": 128, "intermediate_size": 256}, 1),
        ("qwen2", {}, 1),
    ],
    ids=["tied, in one pass", "untied, a pass per window", "biases"],
)
def test_like_whole_models(
    make_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    config: dict[str, Any],
    memory: int,
) -> None:
    monkeypatch.setattr(sensitivity, "MEMORY", memory)
    monkeypatch.setattr(sensitivity, "LOGITS", 4 * 4100 * 11)  # pieces that end inside a window
    model = make_checkpoint(family, **config)
    runner = runner_of(model)
    types = rounding_types(runner.family)
    last = list(types)[-1]
    types[last] = "q4_0"
    found = measure(runner, types, WINDOWS)
    expected = slow(model, types)
    assert list(found) == list(types)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-3, abs=2e-7), name
    assert len(set(found.values())) == len(found)


def test_nothing_changes_the_model(make_checkpoint: Callable[..., Path]) -> None:
    """The same numbers twice from one runner, and the same for a subset of the layers."""
    runner = runner_of(make_checkpoint())
    types = rounding_types(runner.family)
    first = measure(runner, types, WINDOWS)
    assert measure(runner, types, WINDOWS) == first
    some = {name: kind for name, kind in types.items() if "v_proj" in name}
    assert measure(runner, some, WINDOWS) == {name: first[name] for name in some}


def test_finer_types_cost_less(make_checkpoint: Callable[..., Path]) -> None:
    runner = runner_of(make_checkpoint())
    names = list(rounding_types(runner.family))
    two, three, four = (measure(runner, dict.fromkeys(names, kind), WINDOWS) for kind in ("d2q2_64", "d2q3_64", "q4_0"))
    for coarse, fine, allowed in ((two, three, 0.45), (three, four, 0.6)):
        ratios = [fine[name] / coarse[name] for name in names]
        assert 0.15 < np.median(ratios) < allowed


def test_windows_are_spread_over_the_text() -> None:
    windows = np.arange(40).reshape(20, 2)
    assert choose_windows(windows, 3)[:, 0].tolist() == [0, 20, 38]
    np.testing.assert_array_equal(choose_windows(windows, 30), windows)
    assert len(choose_windows(windows)) == sensitivity.WINDOWS


@torch.inference_mode()
def test_a_stack_of_experts_is_rounded_as_a_whole(make_checkpoint: Callable[..., Path]) -> None:
    model = make_checkpoint("qwen3moe", num_experts=4)
    runner = runner_of(model)
    types = rounding_types(runner.family)
    assert len(types) == 2 * 7
    found = measure(runner, types, WINDOWS)
    original = runner.checkpoint.tensor
    tokens = torch.from_numpy(WINDOWS)
    for index, part in ((0, "up_proj"), (1, "down_proj")):
        names = [f"model.layers.{index}.mlp.experts.{number}.{part}.weight" for number in range(4)]
        stack = f"model.layers.{index}.mlp.experts.{part}.weight"
        search = CodebookSearch(BY_NAME[types[stack]])
        rounded = {name: round_layer(original(name).float(), search).weights for name in names}
        expected, other = (
            whole.log_probabilities(whole.states(tokens)).double()
            for whole in (
                WholeModel(runner.checkpoint, runner.family, weights, torch.device("cpu")) for weights in ({}, rounded)
            )
        )
        divergence = float((expected.exp() * (expected - other)).sum(-1).mean())
        assert found[stack] == pytest.approx(divergence, rel=5e-3), stack
