"""Run a checkpoint as one transformers model in float32, with some of its tensors replaced."""

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import nn

from d2q_edge.model.blocks import add_bias, empty_model, model_config, rotary_module
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import Family
from d2q_edge.quantize.kl_divergence import cap_logits

Weights: TypeAlias = Mapping[str, torch.Tensor]
"""Replaced tensors by full name: tensors of the checkpoint, with columns as `Family.arranged`, and "NORM.bias" for any
norm."""


class WholeModel:
    """A checkpoint's model in float32 on one device."""

    def __init__(self, checkpoint: Checkpoint, family: Family, weights: Weights, device: torch.device) -> None:
        """Build the model, and load `weights` and what they leave out from the checkpoint."""
        config = model_config(checkpoint)
        model = empty_model(config, "sdpa", family)
        tensors = {
            name: weights[name] if name in weights else family.arranged(name, checkpoint.tensor(name))
            for name in family.tensor_shapes()
        }
        if family.tied_embeddings:
            tensors[f"{family.head}.weight"] = tensors[f"{family.embedding}.weight"]
        tensors = {name: tensor.to(device, torch.float32) for name, tensor in tensors.items()}
        for index, block in enumerate(model.model.layers):
            family.adapt_block(index, block)
        model.eval().requires_grad_(False)
        model.load_state_dict(tensors, assign=True)
        if (rotary := rotary_module(model.model, config, family)) is not None:
            setattr(model.model, family.rotary, rotary.to(device))
        # Rebuilt outside of the meta device, because these are computed, not loaded.
        for module in model.modules():
            if hasattr(module, "scalar_embed_scale"):
                module.embed_scale = torch.tensor(module.scalar_embed_scale, device=device)
        for name in weights.keys() - tensors.keys():
            add_bias(model.get_submodule(name.removesuffix(".bias")), weights[name].to(device, torch.float32))
        self._model, self._logit_scale, self._logit_cap = model, family.logit_scale, family.logit_cap
        self.device = device

    def module(self, name: str) -> nn.Module:
        """Return a module by its name in the checkpoint."""
        module: nn.Module = self._model.get_submodule(name)
        return module

    def replace(self, name: str, module: nn.Module) -> None:
        """Replace a module by another one."""
        parent, _, last = name.rpartition(".")
        setattr(self._model.get_submodule(parent), last, module)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return all parameters that require gradients, by name."""
        return {name: value for name, value in self._model.named_parameters() if value.requires_grad}

    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the input of lm_head for token ids [windows, context]: float32 [windows, context, hidden]."""
        hidden: torch.Tensor = self._model.model(tokens.to(self.device), use_cache=False).last_hidden_state
        return hidden

    def log_probabilities(self, states: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities of all next tokens, float32 [..., vocab_size]."""
        logits: torch.Tensor = self._model.lm_head(states)
        scaled = logits if self._logit_scale == 1 else logits * self._logit_scale
        return cap_logits(scaled, self._logit_cap).log_softmax(-1)
