"""Give the experts of a Mixture-of-Experts block modules of their own, in place of transformers' two fused tensors.

Checkpoints have the experts one by one, as mlp.experts.N.{gate,up,down}_proj or under a family's names, and so must a
model whose layers are loaded, traced and replaced one at a time. The router stays transformers' own.
"""

from collections.abc import Callable

import torch
from torch import nn

Activation = Callable[[torch.Tensor], torch.Tensor]
PARTS = ("gate_proj", "up_proj", "down_proj")


class Expert(nn.Module):
    """A gated MLP: down(activation(gate(x)) * up(x))."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, activation: Activation, parts: tuple[str, str, str] = PARTS
    ) -> None:
        """Make an expert; `parts` are the names of gate, up and down."""
        super().__init__()
        self.parts, self.activation = parts, activation
        sizes = (hidden_size, intermediate_size), (hidden_size, intermediate_size), (intermediate_size, hidden_size)
        for part, (columns, rows) in zip(parts, sizes, strict=True):
            self.add_module(part, nn.Linear(columns, rows, bias=False))

    def gated(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the input of down, [tokens, intermediate_size]."""
        gate, up, _ = self.parts
        result: torch.Tensor = self.activation(self.get_submodule(gate)(hidden)) * self.get_submodule(up)(hidden)
        return result

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the expert's output, [tokens, hidden_size]."""
        result: torch.Tensor = self.get_submodule(self.parts[2])(self.gated(hidden))
        return result


class Experts(nn.ModuleList):
    """All experts of a block, with the call signature of transformers' fused module."""

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of the chosen experts' outputs, like `hidden` floats [tokens, hidden_size].

        `chosen` are the experts' indices, int64 [tokens, top_k], `weights` the router's, floats of the same shape.
        """
        result = torch.zeros_like(hidden)
        for number, expert in enumerate(self):
            tokens, place = torch.where(chosen == number)
            if len(tokens):
                output = expert(hidden[tokens]) * weights[tokens, place, None]
                result.index_add_(0, tokens, output.to(result.dtype))
        return result


def separate_experts(model: nn.Module, parts: tuple[str, str, str] = PARTS) -> None:
    """Replace every fused experts module inside a model by `Experts`, on the same device and without weights.

    `parts` are the names of an expert's gate, up and down.
    """
    for parent in list(model.modules()):
        fused = getattr(parent, "experts", None)
        parameters = dict(fused.named_parameters(recurse=False)) if isinstance(fused, nn.Module) else {}
        if fused is not None and parameters.keys() == {"gate_up_proj", "down_proj"}:
            count, hidden_size, width = parameters["down_proj"].shape
            with parameters["down_proj"].device:
                parent.experts = Experts(Expert(hidden_size, width, fused.act_fn, parts) for _ in range(count))


class MLPWithExperts(Expert):
    """A gated MLP that all tokens pass, and beside it experts to which a router sends them; the outputs are added."""

    def __init__(
        self, hidden_size: int, width: int, activation: Activation, router: nn.Module, experts: nn.Module
    ) -> None:
        """Make the MLP; `router` and `experts` are a block's own."""
        super().__init__(hidden_size, width, activation)
        self.router, self.experts = router, experts

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the sum, of the shape of `hidden`, floats [..., hidden_size]."""
        tokens = hidden.flatten(0, -2)
        _, weights, chosen = self.router(tokens)
        routed: torch.Tensor = self.experts(tokens, chosen, weights)
        return super().forward(hidden) + routed.view_as(hidden)
