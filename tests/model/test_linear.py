"""Layers that multiply in bfloat16 against float64 on rounded factors."""

import pytest
import torch
from torch import nn

from d2q_edge.model.linear import Bfloat16Linear, use_bfloat16


@pytest.mark.parametrize("bias", [False, True])
def test_only_factors_and_products_are_rounded(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = Bfloat16Linear(96, 40, bias)
    inputs = torch.randn(2, 30, 96, generator=generator, requires_grad=True)
    output = layer(inputs)
    assert output.dtype == torch.float32
    exact = inputs.detach().bfloat16().double() @ layer.weight.detach().bfloat16().double().T
    offset = layer.bias.detach().double() if bias else 0
    # Half a unit in bfloat16's last place, of 8 bits.
    assert torch.all((output.detach().double() - offset - exact).abs() <= 2**-8 * exact.abs() + 1e-5)


def test_gradients_by_the_inputs() -> None:
    generator = torch.Generator().manual_seed(1)
    layer = Bfloat16Linear(96, 40, bias=False).requires_grad_(False)
    inputs = torch.randn(30, 96, generator=generator, requires_grad=True)
    gradient = torch.randn(30, 40, generator=generator)
    (found,) = torch.autograd.grad(layer(inputs), inputs, gradient)
    exact = gradient.double() @ layer.weight.double()
    assert found.dtype == torch.float32
    assert float((found.double() - exact).norm() / exact.norm()) < 2**-7


def test_replaces_what_is_named_and_plain() -> None:
    class Special(nn.Linear):
        """Computes something else."""

    block = nn.Module()
    block.mlp = nn.ModuleDict({"up": nn.Linear(8, 4), "down": nn.Linear(4, 8, bias=False), "other": Special(4, 4)})
    block.router = nn.Linear(8, 2)
    use_bfloat16(block, ["mlp.up", "mlp.down", "mlp.other"])
    kinds = {name: type(block.get_submodule(name)) for name in ("mlp.up", "mlp.down", "mlp.other", "router")}
    assert kinds == {"mlp.up": Bfloat16Linear, "mlp.down": Bfloat16Linear, "mlp.other": Special, "router": nn.Linear}
    weights = {"weight": torch.ones(4, 8), "bias": torch.zeros(4)}
    block.get_submodule("mlp.up").load_state_dict(weights, assign=True)
    assert torch.equal(block.get_submodule("mlp.up")(torch.ones(1, 8)), torch.full((1, 4), 8.0))
