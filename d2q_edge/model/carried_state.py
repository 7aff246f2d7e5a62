"""Carry along with the residual stream what later blocks read besides it, in channels of the hidden states.

In this way gradients reach the block that computed it, and it is kept, read back and shared as the stream itself is:
keys and values by layer type, and the digits of the token's id, which bfloat16 holds exactly up to 256.
"""

import torch

from d2q_edge.model.families import Family
from d2q_edge.model.families.side_inputs import TOKEN_CHANNELS

BASE = 256
KeyValues = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Keys and values by layer type, as transformers' attention hands them on: floats [windows, heads, context, width]."""


class CarriedState:
    """The channels of one family's hidden states, floats [windows, context, `Family.stream_width`]."""

    def __init__(self, family: Family) -> None:
        self._width = family.hidden_size
        self._shapes = dict(family.shared_keys or {})
        self._sizes = [heads * width for heads, width in self._shapes.values() for _ in ("keys", "values")]
        self._has_tokens = family.per_layer_width > 0

    def begin(self, stream: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return hidden states for embeddings [windows, context, hidden] of token ids [windows, context]."""
        parts = [stream]
        if self._sizes:
            parts.append(stream.new_zeros(*stream.shape[:-1], sum(self._sizes)))
        if self._has_tokens:
            powers = BASE ** torch.arange(TOKEN_CHANNELS, device=stream.device)
            parts.append((tokens.to(stream.device)[..., None] // powers % BASE).to(stream.dtype))
        return stream if len(parts) == 1 else torch.cat(parts, -1)

    def stream(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the residual stream alone."""
        return hidden if hidden.shape[-1] == self._width else hidden[..., : self._width]

    def tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the token ids, int64 [windows, context]."""
        digits = hidden[..., -TOKEN_CHANNELS:].round().long()
        return (digits * BASE ** torch.arange(TOKEN_CHANNELS, device=hidden.device)).sum(-1)

    def keys(self, hidden: torch.Tensor) -> KeyValues:
        """Return the keys and values that earlier blocks have left; zeros where there was none yet."""
        parts = hidden[..., self._width : self._width + sum(self._sizes)].split(self._sizes, -1) if self._sizes else ()
        shapes = [shape for shape in self._shapes.values() for _ in ("keys", "values")]
        heads = [part.unflatten(-1, shape).transpose(1, 2) for part, shape in zip(parts, shapes, strict=True)]
        return dict(zip(self._shapes, zip(heads[::2], heads[1::2], strict=True), strict=True))

    def advance(self, stream: torch.Tensor, hidden: torch.Tensor, keys: KeyValues) -> torch.Tensor:
        """Return the hidden states after a block or a part of it.

        Args:
            stream: the residual stream after it.
            hidden: the hidden states in front of it.
            keys: what it got from `keys`, and may have replaced.
        """
        if hidden.shape[-1] == self._width:
            return stream
        parts = [stream]
        for kind in self._shapes:
            parts += [part.transpose(1, 2).flatten(2).to(stream.dtype) for part in keys[kind]]
        return torch.cat([*parts, hidden[..., self._width + sum(self._sizes) :]], -1)
