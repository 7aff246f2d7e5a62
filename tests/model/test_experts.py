"""Test separate experts against transformers' fused ones: whole models, single blocks, and captured inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from d2q_edge.model.blocks import BlockRunner
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.experts import Expert, Experts, separate_experts
from d2q_edge.model.families import family_for
from tests.family_models import EXPERT_MODELS, write_model
from tools.whole_model import WholeModel

Make = Callable[..., Path]
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("qwen3moe", {"shards": 2}),
    ("qwen3moe", {"num_experts": 5, "num_experts_per_tok": 5, "tie_word_embeddings": True}),
    ("olmoe", {"dtype": torch.float32}),
    ("olmoe", {"num_experts_per_tok": 1}),
]
TOKENS = torch.randint(0, 4096, (3, 40), generator=torch.Generator().manual_seed(1))


def runner_for(model: Path) -> BlockRunner:
    checkpoint = Checkpoint.open(model)
    return BlockRunner(checkpoint, family_for(checkpoint.config), torch.device("cpu"))


def whole_model(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, experts_implementation="eager").eval()


@pytest.mark.parametrize(("family", "options"), MODELS)
@torch.inference_mode()
def test_models_are_those_of_transformers(make_checkpoint: Make, family: str, options: dict[str, Any]) -> None:
    path = make_checkpoint(family, **options)
    expected = whole_model(path)(TOKENS)
    checkpoint = Checkpoint.open(path)
    model = WholeModel(checkpoint, family_for(checkpoint.config), {}, torch.device("cpu"))
    found = model.log_probabilities(model.states(TOKENS))
    torch.testing.assert_close(found, expected.logits.log_softmax(-1), rtol=1e-5, atol=1e-5)
    runner = runner_for(path)
    hidden = runner.embed(TOKENS)
    for index in range(2):
        hidden = runner.forward(runner.load(index), hidden)
    torch.testing.assert_close(runner.final_norm()(hidden), model.states(TOKENS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", EXPERT_MODELS)
@torch.inference_mode()
def test_checkpoints_as_transformers_saves_them(tmp_path: Path, name: str) -> None:
    """transformers fuses experts in memory only, but names some settings differently from files on the hub."""
    path = write_model(tmp_path / "tiny", name)
    checkpoint = Checkpoint.open(path)
    family = family_for(checkpoint.config)
    checkpoint.check(family.tensor_shapes())
    assert family.num_experts == (0 if name == "granite-hybrid" else 4)
    model = WholeModel(checkpoint, family, {}, torch.device("cpu"))
    found = model.log_probabilities(model.states(TOKENS))
    torch.testing.assert_close(found, whole_model(path)(TOKENS).logits.log_softmax(-1), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_every_expert_matters_and_has_its_own_weights(make_checkpoint: Make) -> None:
    """Changing one expert, by its checkpoint name, changes exactly the tokens that are routed to it."""
    path = make_checkpoint("qwen3moe")
    runner = runner_for(path)
    hidden = runner.embed(TOKENS)
    block = runner.load(0)
    before = runner.forward(block, hidden)
    chosen: list[torch.Tensor] = []
    block.get_submodule("mlp.gate").register_forward_hook(lambda *args: chosen.append(args[2][2]))
    runner.forward(block, hidden)
    for number in range(8):
        for part in ("gate_proj", "up_proj", "down_proj"):
            layer = block.get_submodule(f"mlp.experts.{number}.{part}")
            name = f"model.layers.0.mlp.experts.{number}.{part}.weight"
            weight = layer.weight
            assert isinstance(weight, nn.Parameter)
            assert torch.equal(weight, runner.checkpoint.tensor(name).float())
            layer.weight = nn.Parameter(torch.zeros_like(weight), requires_grad=False)
            changed = (runner.forward(block, hidden) != before).any(-1).flatten()
            layer.weight = weight
            assert torch.equal(changed, (chosen[0] == number).any(-1)), name


@torch.inference_mode()
def test_hooks_see_the_tokens_of_an_expert(make_checkpoint: Make) -> None:
    runner = runner_for(make_checkpoint("olmoe"))
    block, hidden = runner.load(1), runner.embed(TOKENS)
    normed = runner.input_of(block, "mlp.gate", hidden)
    probabilities = (normed @ runner.checkpoint.tensor("model.layers.1.mlp.gate.weight").float().T).softmax(-1)
    chosen = probabilities >= probabilities.topk(3).values[:, -1:]
    assert chosen.sum() == 3 * TOKENS.numel()
    for number in range(6):
        seen = runner.input_of(block, f"mlp.experts.{number}.up_proj", hidden)
        torch.testing.assert_close(seen, normed[chosen[:, number]])


def test_experts_by_hand() -> None:
    """Two experts of width 1: x -> 2 * relu(x) * x and x -> -relu(3x) * x; the third one gets no tokens."""
    experts = Experts(Expert(1, 1, torch.relu) for _ in range(3))
    for expert, (gate, up, down) in zip(experts, [(1.0, 1.0, 2.0), (3.0, 1.0, -1.0), (9.0, 9.0, 9.0)], strict=True):
        for layer, value in ((expert.gate_proj, gate), (expert.up_proj, up), (expert.down_proj, down)):
            assert isinstance(layer, nn.Linear)
            nn.init.constant_(layer.weight, value)
    hidden = torch.tensor([[1.0], [-1.0], [2.0]])
    chosen = torch.tensor([[0, 1], [1, 0], [1, 0]])
    weights = torch.tensor([[0.5, 0.25], [1.0, 1.0], [0.5, 1.0]])
    result = experts(hidden, chosen, weights)
    assert result.flatten().tolist() == [0.5 * 2 - 0.25 * 3, 0.0, -0.5 * 12 + 8.0]


def test_dense_models_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.add_module("experts", nn.Linear(2, 2))
    separate_experts(model)
    assert [type(module) for module in model] == [nn.Linear, nn.Linear]
