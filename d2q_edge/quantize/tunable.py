"""A quantized linear layer whose block scales and codes can be tuned by gradients.

Knows one matrix in blocks: W = units * scales, units being entries of the chosen codebooks. Scales are tuned through
their logarithm, so that a step is relative to their size. Codes are tuned through a latent matrix in units of d, one
point per code (a pair or a single weight): its nearest entry in the group's codebook is used, and its gradient is that
of the entry (straight-through estimation). Does not know the loss; refine.py does.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from d2q_edge.formats.tensor_types import GROUP
from d2q_edge.quantize.codebook_search import CodebookSearch, stored_scale
from d2q_edge.quantize.quantized_layer import QuantizedLayer

CHUNK = 1 << 18
"""Codes whose nearest entries are found at once: bounds the memory at about 50 MB."""


class TunableLinear(nn.Module):
    """Stands in for nn.Linear in a model that is tuned.

    Attributes:
        log_scales: float32 [rows, blocks], a parameter.
        latent: float32 [rows, cols] in units of d, a parameter; None while the codes are fixed.
    """

    def __init__(self, layer: QuantizedLayer, search: CodebookSearch, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.search, self.kind = search, search.tensor_type
        self.bias = bias
        self.log_scales = nn.Parameter(layer.scales.float().log())
        self.latent: nn.Parameter | None = None
        scales = layer.scales.float().repeat_interleave(self.kind.block_size, 1)
        self.units: torch.Tensor
        self.books: torch.Tensor
        self.register_buffer("units", (layer.weights / scales).round().to(torch.int8))
        self.register_buffer("books", layer.codebooks.long())

    def free_codes(self) -> None:
        """Make the codes tunable, starting from what they are."""
        self.latent = nn.Parameter(self.units.float())

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.latent is None:
            units = self.units.float()
        else:
            nearest, _ = self._nearest()
            units = self.latent + (nearest - self.latent.detach())
        weight = units * self.log_scales.exp().repeat_interleave(self.kind.block_size, 1)
        return F.linear(hidden, weight, self.bias)

    @torch.no_grad()
    def layer(self) -> QuantizedLayer:
        """The present blocks, scales as they are stored."""
        scales = stored_scale(self.log_scales.exp())
        if self.latent is None:
            units, codes = self._entries(self.units.float())
        else:
            units, codes = self._nearest()
        weights = units * scales.repeat_interleave(self.kind.block_size, 1)
        return QuantizedLayer(scales.half(), self.books.byte(), codes.byte(), weights)

    @torch.no_grad()
    def _nearest(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.latent is None:
            raise RuntimeError("the codes are fixed")
        return self._entries(self.latent.detach())

    def _entries(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest entries [rows, cols], in units of d, and their codes [rows, codes]."""
        vectors = self.search.vectors(values)
        units, codes = [], []
        per_chunk = max(1, CHUNK // vectors.shape[1])
        for points, books in zip(vectors.split(per_chunk), self.books.reshape(-1).split(per_chunk), strict=True):
            levels = self.search.levels[books]
            code = (points[:, :, None] - levels[:, None]).square().sum(3).argmin(2)
            units.append(levels.gather(1, code[:, :, None].expand(-1, -1, levels.shape[2])))
            codes.append(code)
        # Back from [groups, codes, V] to columns: the parts of a vector are GROUP / V columns apart.
        flat = torch.cat(units).transpose(1, 2).reshape(-1, GROUP)
        return flat.view(values.shape), torch.cat(codes).view(len(values), -1)


class TunableNorm(nn.Module):
    """Stands in for a norm: gain multiplies its weight, shift adds to its bias in units of the weight.

    Both are relative to the weight, so that a step means the same in every channel, whatever its column scale.
    """

    def __init__(self, norm: nn.Module, bias: torch.Tensor | None, *, biased: bool, offset: float = 0.0) -> None:
        """Wrap a norm.

        Args:
            norm: with a weight [channels].
            bias: float32 [channels] that it has already, if any.
            biased: whether it may have a bias.
            offset: what the norm adds to its weight before it multiplies (Family.norm_offset).
        """
        super().__init__()
        self.norm, self.offset = norm, offset
        weight: Any = norm.weight
        self.weight: torch.Tensor
        self.start: torch.Tensor
        self.register_buffer("weight", weight.detach() + offset)
        self.register_buffer("start", torch.zeros_like(self.weight) if bias is None else bias.clone())
        self.gain = nn.Parameter(torch.ones_like(self.weight))
        self.shift = nn.Parameter(torch.zeros_like(self.weight)) if biased else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.norm(hidden) * self.gain
        return output if self.shift is None else output + self._bias(self.shift)

    @torch.no_grad()
    def tensors(self) -> dict[str, torch.Tensor]:
        """The present weight, and the bias where there may be one: float32 [channels]."""
        tensors = {"weight": self.weight * self.gain - self.offset}
        if self.shift is not None:
            tensors["bias"] = self._bias(self.shift)
        return tensors

    def _bias(self, shift: torch.Tensor) -> torch.Tensor:
        return self.start + shift * self.weight.abs()
