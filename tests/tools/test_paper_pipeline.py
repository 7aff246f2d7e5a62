"""The paper's recipe for whole models: what its statistics and corrections are, by running the whole model instead."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from d2q_edge.model.blocks import BlockRunner
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from d2q_edge.quantize.statistics import InputStatistics
from tools.paper_recipe import pipeline as paper_pipeline
from tools.paper_recipe.feedback import Fit, quantize_columns
from tools.paper_recipe.grid import clipped_grid, dual_scale_grid
from tools.paper_recipe.pipeline import Recipe, quantize_model

Make = Callable[..., Path]
WINDOWS = np.random.default_rng(2).integers(0, 4096, (12, 40))
SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
NORM = "post_attention_layernorm"


def runner_of(model: Path) -> BlockRunner:
    checkpoint = Checkpoint.open(model)
    return BlockRunner(checkpoint, family_for(checkpoint.config), torch.device("cpu"))


def seen_at(model: Path, weights: Mapping[str, torch.Tensor], module: str, *, output: bool = False) -> torch.Tensor:
    """What reaches (or leaves) a module of the whole model, [tokens, channels], with some tensors replaced."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    biases = {name: value for name, value in weights.items() if name.endswith("norm.bias")}
    _, unexpected = whole.load_state_dict({n: v for n, v in weights.items() if n not in biases}, strict=False)
    assert unexpected == []
    for name, value in biases.items():
        norm = whole.get_submodule(name.removesuffix(".bias"))
        norm.register_forward_hook(lambda _module, _arguments, result, value=value: result + value)
    seen: list[torch.Tensor] = []
    whole.get_submodule(module).register_forward_hook(
        lambda _module, arguments, result: seen.append((result if output else arguments[0]).flatten(0, 1))
    )
    with torch.inference_mode():
        whole(torch.from_numpy(WINDOWS))
    return seen[0]


def before(weights: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    names = list(weights)
    return {done: weights[done] for done in names[: names.index(name)]}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_statistics_and_corrections(make_checkpoint: Make, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    model = make_checkpoint(family, **SMALL)
    solved: list[tuple[InputStatistics, Fit, float]] = []

    def spy(weights: torch.Tensor, statistics: InputStatistics, fit: Fit, alpha: float) -> torch.Tensor:
        solved.append((statistics, fit, alpha))
        return quantize_columns(weights, statistics, fit, alpha)

    monkeypatch.setattr(paper_pipeline, "quantize_columns", spy)
    runner = runner_of(model)
    recipe = Recipe(alpha=0.4, dual_scale=True, correct=True)
    weights = quantize_model(runner, recipe, 2, WINDOWS, batch_tokens=160)  # three batches
    biases = [f"model.layers.{index}.{NORM}.bias" for index in range(2)]
    assert set(weights) == {*runner.family.linear_weights(), *biases, "model.norm.bias"}

    linear_groups = [(index, group.linears[0]) for index in range(2) for group in runner.family.block_groups(0)]
    for (index, layer), (statistics, fit, alpha) in zip(linear_groups, solved, strict=True):
        module = f"model.layers.{index}.{layer}"
        original = seen_at(model, {}, module)
        x = seen_at(model, before(weights, f"{module}.weight"), module)
        torch.testing.assert_close(statistics.hessian, 2 / len(x) * x.T @ x, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(statistics.dXXT, 2 / len(x) * (original - x).T @ x, rtol=1e-3, atol=1e-4)
        assert alpha == 0.4
        assert fit.func is (dual_scale_grid if layer == "mlp.down_proj" else clipped_grid)  # type: ignore[attr-defined]

    for index, bias in enumerate(biases):
        module = bias.removesuffix(".bias")
        student = seen_at(model, before(weights, bias), module, output=True)
        teacher = seen_at(model, before(weights, f"model.layers.{index}.self_attn.q_proj.weight"), module, output=True)
        torch.testing.assert_close(weights[bias], (teacher - student).mean(0), rtol=1e-3, atol=1e-5)
        assert float(weights[bias].abs().max()) > 1e-3
    teacher = seen_at(model, {}, "model.norm", output=True)
    student = seen_at(model, before(weights, "model.norm.bias"), "model.norm", output=True)
    torch.testing.assert_close(weights["model.norm.bias"], (teacher - student).mean(0), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dual_scale", [False, True])
def test_rounding(make_checkpoint: Make, dual_scale: bool) -> None:
    model = make_checkpoint(**SMALL)
    runner = runner_of(model)
    weights = quantize_model(runner, Recipe(feedback=False, dual_scale=dual_scale), 3, WINDOWS)
    assert list(weights) == runner.family.linear_weights()
    for name, found in weights.items():
        weight = runner.checkpoint.tensor(name).float()
        size = min(128, weight.shape[1])
        fit = dual_scale_grid if dual_scale and "down_proj" in name else clipped_grid
        expected = [fit(part, 3).round(part) for part in weight.split(size, dim=1)]
        torch.testing.assert_close(found, torch.cat(expected, dim=1))


def test_without_corrections_norms_stay(make_checkpoint: Make) -> None:
    runner = runner_of(make_checkpoint(**SMALL))
    assert list(quantize_model(runner, Recipe(), 2, WINDOWS)) == runner.family.linear_weights()
    assert all(parameter.is_meta for parameter in runner._layers.parameters()), "no block stays in memory"


def test_rounding_with_corrections(make_checkpoint: Make) -> None:
    runner = runner_of(make_checkpoint(**SMALL))
    weights = quantize_model(runner, Recipe(feedback=False, correct=True), 2, WINDOWS)
    assert float(weights[f"model.layers.0.{NORM}.bias"].abs().max()) > 1e-3
    assert float(weights["model.norm.bias"].abs().max()) > 1e-3


def test_bits_per_weight(make_checkpoint: Make) -> None:
    family = runner_of(make_checkpoint(hidden_size=128, intermediate_size=384, num_attention_heads=4)).family
    # Groups of 128, two float16 numbers each.
    assert Recipe().bits_per_weight(family, 2) == 2.25
    assert Recipe(dual_scale=True).bits_per_weight(family, 2) == 2.25
    # A third number for the 128 x 384 weights of down: of 4 * 128 * 128 * 0.75 + 3 * 128 * 384.
    assert Recipe().bits_per_weight(family, 3) == 3.25
    down, rest = 128 * 384, 2 * 128 * 384 + 2 * 128 * 128 + 2 * 64 * 128
    expected = (down * 3.375 + rest * 3.25) / (down + rest)
    assert Recipe(dual_scale=True).bits_per_weight(family, 3) == pytest.approx(expected)
