"""Gradients of the loss by layers' outputs, block by block, against autograd through transformers' whole model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from d2q_edge.calibration import output_gradients
from d2q_edge.calibration.output_gradients import guided_modules
from d2q_edge.model.blocks import BlockRunner
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from d2q_edge.model.families.experts import dense_groups
from tests.family_models import write_model

NAMES = (
    "llama3",
    "qwen2",
    "gemma3",
    "phi4-mini",
    "granite",
    "ministral3",
    "olmo3",
    "lfm2",
    "qwen3.5",
    "qwen3moe",
    "lfm2moe",
    "granite-hybrid",
)
TOKENS = torch.randint(0, 4000, (5, 24), generator=torch.Generator().manual_seed(0))


FUSED = {"gate_proj": ("input_linear", 0), "up_proj": ("input_linear", 1), "down_proj": ("output_linear", 0)}
"""Where transformers has the layers of Granite's MLP: a layer that puts out both halves, and one behind it."""


def expected(model: Path, names: set[str]) -> dict[str, torch.Tensor]:
    """Return the gradient by every module's output, [tokens, channels] in float64."""
    parts = {name: FUSED[name.rpartition(".")[2]] for name in names if ".shared_mlp." in name}
    fused = {name: f"{name.rpartition('.')[0]}.{layer}" for name, (layer, _) in parts.items()}
    found = _gradients(model, {fused.get(name, name) for name in names})
    for name, (layer, half) in parts.items():
        gradient = found[fused[name]]
        found[name] = gradient.chunk(2, -1)[half] if layer == "input_linear" else gradient
    return found


def _gradients(model: Path, names: set[str]) -> dict[str, torch.Tensor]:
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, experts_implementation="eager").eval()
    found: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def watch(_module: nn.Module, _inputs: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            tensor.register_hook(lambda gradient: found.__setitem__(name, gradient.flatten(0, -2)))

        return watch

    for name in names:
        whole.get_submodule(name).register_forward_hook(hook(name))
    embedded = whole.get_input_embeddings()(TOKENS).detach().requires_grad_()
    logits = whole(inputs_embeds=embedded).logits[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum").backward()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_as_autograd(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_gradients, "KEPT", torch.float32)
    monkeypatch.setattr(output_gradients, "LOGITS", 2**20)
    model = write_model(tmp_path / "tiny", name, num_hidden_layers=2)
    checkpoint = Checkpoint.open(model)
    family = family_for(checkpoint.config)
    runner = BlockRunner(checkpoint, family, torch.device("cpu"))
    with torch.inference_mode():
        blocks = list(output_gradients.output_gradients(runner, TOKENS.split(3), observed=1))
    assert [block.index for block in blocks] == [1, 0]
    every = {f"{family.block_prefix(index)}{module}" for index in range(2) for module in guided_modules(family, index)}
    gradients = expected(model, every)
    for block in blocks:
        prefix = family.block_prefix(block.index)
        assert sorted(block.squares) == sorted(guided_modules(family, block.index))
        for module, found in block.squares.items():
            squares = gradients[prefix + module].square().mean(-1)
            assert [len(part) for part in found] == [3 * 24, 2 * 24]
            torch.testing.assert_close(torch.cat(found).double(), squares, rtol=2e-3, atol=1e-4 * float(squares.max()))
        groups = dense_groups(family, block.index)
        assert list(block.hessians) == [group.linears[0] for group in groups]
        assert groups or name == "qwen3moe"
        for group in groups:
            # The first batch alone.
            rows = torch.cat([gradients[prefix + layer][: 3 * 24] for layer in group.linears], 1)
            moments = sum(torch.outer(row, row) / row.norm() for row in rows if row.norm() > 0)
            (piece,) = block.hessians[group.linears[0]].pieces
            torch.testing.assert_close(piece.double(), moments, rtol=2e-3, atol=1e-3 * float(moments.abs().max()))
