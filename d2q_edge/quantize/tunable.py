"""Let gradients tune the scales, codes, gains and biases of a quantized model's linear layers and norms (refine.py).

W = units * scales, units being entries of the chosen codebooks. Scales are tuned by their logarithm, so that a step is
relative to their size. Codes are tuned by a latent point per code in units of d: the nearest entry of the group's
codebook, or those on the nearest path where entries depend on the code before, is used, and its gradient passes
straight through to the latent point.
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
    """A quantized layer in place of an nn.Linear.

    Attributes:
        log_scales: float32 [rows, blocks], a parameter.
        latent: float32 [rows, columns] in units of d, a parameter; None while the codes are fixed.
        units: the entries at the start, int8 [rows, columns].
        codebooks: int64 [rows, columns / 32].
    """

    units: torch.Tensor
    codebooks: torch.Tensor

    def __init__(
        self, layer: QuantizedLayer, search: CodebookSearch, bias: torch.Tensor | None, *, chunk: int = CHUNK
    ) -> None:
        super().__init__()
        self.search, self.kind, self.bias, self._chunk = search, search.tensor_type, bias, chunk
        scales = layer.scales.float()
        self.log_scales = nn.Parameter(scales.log())
        self.latent: nn.Parameter | None = None
        self.register_buffer("units", (layer.weights / self._column_scales(scales)).round().to(torch.int8))
        self.register_buffer("codebooks", layer.codebooks.long())

    def free_codes(self) -> None:
        """Make the codes tunable, starting from the present ones."""
        self.latent = nn.Parameter(self.units.float())

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the layer with its present scales and codes."""
        units = self.units.float()
        if self.latent is not None:
            units = self.latent + (self._nearest(self.latent.detach())[0] - self.latent.detach())
        return F.linear(hidden, units * self._column_scales(self.log_scales.exp()), self.bias)

    @torch.no_grad()
    def layer(self) -> QuantizedLayer:
        """Return the present blocks, with the scales that can be stored."""
        scales = stored_scale(self.log_scales.exp())
        units, codes = self._nearest(self.units.float() if self.latent is None else self.latent)
        weights = units * self._column_scales(scales)
        return QuantizedLayer(scales.half(), self.codebooks.byte(), codes.byte(), weights)

    @torch.no_grad()
    def _nearest(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the nearest entries [rows, columns], in units of d, and their codes [rows, codes]."""
        vectors = self.search.vectors(values)
        units, codes = [], []
        per_chunk = max(1, self._chunk // vectors.shape[1])
        for points, codebooks in zip(
            vectors.split(per_chunk), self.codebooks.reshape(-1).split(per_chunk), strict=True
        ):
            nearest, code = self.search.nearest(points, codebooks)
            units.append(nearest)
            codes.append(code)
        # Back from [groups, codes, V] to columns: the columns of a code are GROUP / V apart.
        flat = torch.cat(units).transpose(1, 2).reshape(-1, GROUP)
        return flat.view(values.shape), torch.cat(codes).view(len(values), -1)

    def _column_scales(self, scales: torch.Tensor) -> torch.Tensor:
        return scales.repeat_interleave(self.kind.block_size, 1)


class TunableNorm(nn.Module):
    """A norm with a tunable gain, which multiplies its weight, and shift, which is added to its bias in weight units.

    Both are relative to the weight, so that a step means the same in every channel, whatever its column scale.
    """

    weight: torch.Tensor
    start: torch.Tensor

    def __init__(self, norm: nn.Module, bias: torch.Tensor | None, *, biased: bool, offset: float = 0.0) -> None:
        """Wrap a norm.

        Args:
            norm: has a weight [channels].
            bias: the norm's bias so far, float32 [channels], if any.
            biased: whether it may have a bias.
            offset: what the norm adds to its weight before it multiplies (Gemma's norms: 1).
        """
        super().__init__()
        self.norm, self.offset = norm, offset
        weight: Any = norm.weight
        self.register_buffer("weight", weight.detach() + offset)
        self.register_buffer("start", torch.zeros_like(self.weight) if bias is None else bias.clone())
        self.gain = nn.Parameter(torch.ones_like(self.weight))
        self.shift = nn.Parameter(torch.zeros_like(self.weight)) if biased else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the norm with its present gain and shift."""
        output: torch.Tensor = self.norm(hidden) * self.gain
        return output if self.shift is None else output + self._bias(self.shift)

    @torch.no_grad()
    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the present "weight", and "bias" where there may be one: float32 [channels]."""
        bias = {} if self.shift is None else {"bias": self._bias(self.shift)}
        return {"weight": self.weight * self.gain - self.offset, **bias}

    def _bias(self, shift: torch.Tensor) -> torch.Tensor:
        return self.start + shift * self.weight.abs()
