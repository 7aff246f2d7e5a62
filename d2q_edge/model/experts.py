"""Experts as modules with a checkpoint's names, in place of transformers' fused ones.

transformers keeps the experts of a block in two big tensors. Checkpoints, and everything here that loads, watches or
replaces one layer, know them one by one: mlp.experts.N.{gate,up,down}_proj. Knows how an expert computes; which tokens
go to which experts is the router's business, which is transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

Activation = Callable[[torch.Tensor], torch.Tensor]


class Expert(nn.Module):
    """One gated mlp."""

    def __init__(self, width: int, inner: int, activation: Activation) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.activation = activation

    def gated(self, hidden: torch.Tensor) -> torch.Tensor:
        """What down reads: [tokens, inner]."""
        result: torch.Tensor = self.activation(self.gate_proj(hidden)) * self.up_proj(hidden)
        return result

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down_proj(self.gated(hidden))
        return result


class Experts(nn.ModuleList):
    """All experts of a block, called as transformers calls its own."""

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the chosen experts' outputs, [tokens, width].

        Args:
            hidden: floats [tokens, width].
            chosen: int64 [tokens, experts per token].
            weights: of the chosen experts, floats [tokens, experts per token].
        """
        result = torch.zeros_like(hidden)
        for number, expert in enumerate(self):
            tokens, place = torch.where(chosen == number)
            if len(tokens):
                result.index_add_(0, tokens, expert(hidden[tokens]) * weights[tokens, place, None])
        return result


def separate_experts(model: nn.Module) -> None:
    """Put `Experts` in the place of every fused experts module inside a model, on the same device.

    Weights are not carried over: they are loaded afterwards, by the checkpoint's names.
    """
    for parent in list(model.modules()):
        fused = getattr(parent, "experts", None)
        parameters = dict(fused.named_parameters(recurse=False)) if isinstance(fused, nn.Module) else {}
        if fused is not None and parameters.keys() == {"gate_up_proj", "down_proj"}:
            count, width, inner = parameters["down_proj"].shape
            with parameters["down_proj"].device:
                parent.experts = Experts(Expert(width, inner, fused.act_fn) for _ in range(count))
