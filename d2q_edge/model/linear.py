"""Multiply the inputs of linear layers by their weights in bfloat16, as models are trained and served.

The inputs, outputs and weights stay float32, so that everything between the layers is computed as without this.
"""

from collections.abc import Iterable

import torch
from torch import nn


class Bfloat16Linear(nn.Linear):
    """A linear layer with float32 weights whose products are computed in bfloat16; the bias is added in float32."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the output, float32 [..., out_features], for an input float32 [..., in_features]."""
        output = nn.functional.linear(input.bfloat16(), self.weight.bfloat16()).float()
        return output if self.bias is None else output + self.bias


def use_bfloat16(block: nn.Module, layers: Iterable[str]) -> None:
    """Replace layers of a block that are plain linear ones by `Bfloat16Linear`, without weights yet."""
    for name in layers:
        layer = block.get_submodule(name)
        if type(layer) is nn.Linear:
            bias = layer.bias is not None
            block.set_submodule(name, Bfloat16Linear(layer.in_features, layer.out_features, bias, device="meta"))
