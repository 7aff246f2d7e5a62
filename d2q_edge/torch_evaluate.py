"""Perplexity and KL divergence of dequantized weights in torch, without a file and without the runtime.

Knows how to build a checkpoint as one transformers model in float32 with some of its weights replaced, and how to
compare it with the original by llama-perplexity's protocol, as evaluation.py does for files: chunks of equal length,
the tokens of the second half scored. Does not know where the weights come from.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from d2q_edge.blocks import add_bias, empty_model, model_config
from d2q_edge.calibration import Text
from d2q_edge.checkpoint import Checkpoint
from d2q_edge.errors import D2QError
from d2q_edge.families import Family

BATCH_TOKENS = 4096
"""Tokens per forward pass."""
Weights: TypeAlias = Mapping[str, torch.Tensor]
"""Replaced tensors by full name: those of the checkpoint, and "NORM.bias" for any norm."""


@dataclass(frozen=True)
class Distance:
    """What was measured on one text; kl_divergence is from the original model, in nats per token."""

    perplexity: float
    kl_divergence: float


def evaluation_chunks(
    tokenizer: Any, text: Text, chunks: int | None, context: int, bos: int | None
) -> npt.NDArray[np.int64]:
    """The first chunks of a text, int64 [chunks, context]; BOS replaces the first token of each, where there is one.

    Raises:
        D2QError: the text is shorter than one chunk.
    """
    ids = np.array(tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
    available = len(ids) // context
    if available == 0:
        raise D2QError(
            f"the text {text.source} has {len(ids)} tokens, less than one chunk of {context}; use a longer one"
        )
    windows = ids[: context * min(available, chunks or available)].reshape(-1, context)
    if bos is not None:
        windows[:, 0] = bos
    return windows


class WholeModel:
    """A checkpoint's model in float32 on one device."""

    def __init__(self, checkpoint: Checkpoint, family: Family, weights: Weights, device: torch.device) -> None:
        """Build it.

        Args:
            checkpoint: where all tensors come from that are not in `weights`.
            family: of the checkpoint.
            weights: replaced tensors.
            device: where to.
        """
        config = model_config(checkpoint)
        model = empty_model(config, "sdpa")
        tensors = {
            name: (weights[name] if name in weights else checkpoint.tensor(name)).to(device, torch.float32)
            for name in family.tensor_shapes()
        }
        if family.tied_embeddings:
            tensors[f"{family.head}.weight"] = tensors[f"{family.embedding}.weight"]
        model.eval().requires_grad_(False)
        model.load_state_dict(tensors, assign=True)
        # Made anew outside the meta device, because they are computed, not loaded.
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
        if hasattr(model.model.embed_tokens, "embed_scale"):
            model.model.embed_tokens.embed_scale = torch.tensor(family.embedding_scale, device=device)
        for name in weights.keys() - tensors.keys():
            add_bias(model.get_submodule(name.removesuffix(".bias")), weights[name].to(device, torch.float32))
        self._model = model
        self.device = device

    def module(self, name: str) -> nn.Module:
        """A module by its name in the checkpoint."""
        module: nn.Module = self._model.get_submodule(name)
        return module

    def replace(self, name: str, module: nn.Module) -> None:
        """Put another module in a module's place."""
        parent, _, last = name.rpartition(".")
        setattr(self._model.get_submodule(parent), last, module)

    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters that require gradients, by name."""
        return {name: value for name, value in self._model.named_parameters() if value.requires_grad}

    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the head reads, at every token: [windows, context, hidden]."""
        hidden: torch.Tensor = self._model.model(tokens.to(self.device), use_cache=False).last_hidden_state
        return hidden

    def scored_states(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the head reads where a scored token is next: [windows, context - context // 2 - 1, hidden]."""
        return self.states(tokens)[:, tokens.shape[1] // 2 : -1]

    def log_probabilities(self, states: torch.Tensor) -> torch.Tensor:
        """Of all next tokens, [..., vocabulary]."""
        logits: torch.Tensor = self._model.lm_head(states)
        return logits.log_softmax(-1)


class Reference:
    """The original model on one text. Keeps what its head reads, a fraction of the size of its probabilities."""

    @torch.inference_mode()
    def __init__(self, model: WholeModel, windows: npt.NDArray[np.int64]) -> None:
        self._model = model
        self._batches = torch.from_numpy(windows).split(max(1, BATCH_TOKENS // windows.shape[1]))
        self._states = [model.scored_states(tokens) for tokens in self._batches]

    @torch.inference_mode()
    def compare(self, model: WholeModel) -> Distance:
        """Measure another model of the same tokens."""
        loss = divergence = torch.zeros((), dtype=torch.float64, device=model.device)
        count = 0
        for tokens, states in zip(self._batches, self._states, strict=True):
            expected = self._model.log_probabilities(states)
            found = model.log_probabilities(model.scored_states(tokens))
            targets = tokens[:, tokens.shape[1] // 2 + 1 :, None].to(model.device)
            loss = loss - found.gather(-1, targets).sum(dtype=torch.float64)
            divergence = divergence + (expected.exp() * (expected - found)).sum(dtype=torch.float64)
            count += targets.numel()
        return Distance(math.exp(float(loss) / count), float(divergence) / count)
