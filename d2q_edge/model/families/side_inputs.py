"""Describe what the blocks of a model read besides the residual stream: keys and values of earlier blocks, and
embeddings of the tokens that every block has for itself."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

TOKEN_CHANNELS = 3
"""Channels in which a hidden state carries its token's id, where blocks have embeddings for themselves."""

GATE, PROJECTION = "per_layer_input_gate", "per_layer_projection"
"""The linear layers of a block that its own embeddings pass between."""


class PerLayerBranch(nn.Module):
    """The residual branch that reads the block's own embeddings, of modules that are the block's."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._block = (block,)  # not a submodule, so that its weights keep their names

    def forward(self, stream: torch.Tensor, per_layer_input: torch.Tensor) -> torch.Tensor:
        """Return what the branch puts out, float32 [windows, context, hidden], for embeddings [..., width]."""
        block: Any = self._block[0]
        output: torch.Tensor = block.get_submodule(PROJECTION)(
            block.act_fn(block.get_submodule(GATE)(stream)) * per_layer_input
        )
        return output


class SideInputs:
    """The part of a family that concerns what its blocks read besides the residual stream."""

    hidden_size: int
    num_kv_heads: int
    head_dim: int
    # Keys and values that later blocks share, by layer type: key-value heads, and channels of each. None where the
    # modules of transformers know no such thing.
    shared_keys: Mapping[str, tuple[int, int]] | None = None
    per_layer_width: int = 0  # channels of the embeddings that a block has for itself; 0 without
    # Tensors outside of the blocks: the table of these embeddings, the projection that is added, and its norm.
    per_layer_table: ClassVar[str] = "model.embed_tokens_per_layer"
    per_layer_projection: ClassVar[str] = "model.per_layer_model_projection"
    per_layer_norm: ClassVar[str] = "model.per_layer_projection_norm"

    @property
    def stream_width(self) -> int:
        """Return the channels of a hidden state: the residual stream's, and what is carried along with it."""
        keys = sum(2 * heads * channels for heads, channels in (self.shared_keys or {}).values())
        return self.hidden_size + keys + (TOKEN_CHANNELS if self.per_layer_width else 0)

    def cached_width(self, index: int) -> int:
        """Return the channels of keys and values that llama.cpp keeps of every token for block `index`."""
        return 2 * self.num_kv_heads * self.head_dim

    def outer_tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the tensors outside of the blocks besides embeddings, final norm and head, with their shapes."""
        return {}
