"""Compute the embeddings that every block has for itself (Gemma 4 E2B and E4B), one block at a time.

transformers' Gemma4TextModel (get_per_layer_inputs, project_per_layer_inputs) makes those of all blocks at once, which
are several times as large as the hidden states. They depend on the token alone, so that a block's can be made when it
runs, from its columns of the table.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import Family


class PerLayerEmbeddings:
    """The embeddings of all blocks of a checkpoint; the ordinary ones, which they are made from, stay in memory."""

    def __init__(self, checkpoint: Checkpoint, family: Family, device: torch.device) -> None:
        self._checkpoint, self._family, self._device = checkpoint, family, device
        self._embedding = checkpoint.tensor(f"{family.embedding}.weight").to(device)
        self._norm = checkpoint.tensor(f"{family.per_layer_norm}.weight").to(device, torch.float32)

    def of_block(self, index: int) -> PerLayerInput:
        """Return those of block `index`; raise D2QError if a weight can't be read, or is NaN or infinite."""
        family, width = self._family, self._family.per_layer_width
        part = slice(index * width, (index + 1) * width)
        table = self._checkpoint.part(f"{family.per_layer_table}.weight", columns=part).to(self._device)
        projection = self._checkpoint.part(f"{family.per_layer_projection}.weight", rows=part)
        # One factor for both: the embeddings' scale, and that of what is projected.
        scaled = projection.to(self._device, torch.float32) * (family.embedding_scale / math.sqrt(family.hidden_size))
        return PerLayerInput(table, self._embedding, scaled, self._norm, family.norm_eps)


class PerLayerInput:
    """A block's own embeddings; copies of the block share them."""

    def __init__(
        self,
        table: torch.Tensor,
        embedding: torch.Tensor,
        projection: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
    ) -> None:
        """Take the block's columns of the table [vocabulary, width], and what the ordinary embeddings
        [vocabulary, hidden] go through: projection float32 [width, hidden], and norm float32 [width]."""
        self._table, self._embedding, self._projection, self._norm = table, embedding, projection, norm
        self._eps = eps

    def __deepcopy__(self, memo: dict[int, Any]) -> PerLayerInput:
        return self

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the block's embeddings of token ids [windows, context]: float32 [windows, context, width]."""
        projected = nn.functional.embedding(tokens, self._embedding).float() @ self._projection.T
        normed = nn.functional.rms_norm(projected, self._norm.shape, self._norm, self._eps)
        own = nn.functional.embedding(tokens, self._table).float() * math.sqrt(self._table.shape[1])
        return (normed + own) * math.sqrt(0.5)
