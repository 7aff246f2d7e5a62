"""Let gradients tune the scales, codes, gains and biases of a quantized model's linear layers and norms (refine.py).

W = units * scales, units being entries of the chosen codebooks. Scales are tuned by their logarithm, so that a step is
relative to their size. Codes are tuned by a latent point per code in units of d: the nearest entry of the group's
codebook, or those on the nearest path where entries depend on the code before, is used, and its gradient passes
straight through to the latent point. W is made once per step: forward and backward passes know W and its gradient only,
in the dtype that they compute in, and the gradients of scales and latent points follow from that.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from d2q_edge.formats.tensor_types import GROUP
from d2q_edge.quantize import triton
from d2q_edge.quantize.codebook_search import CodebookSearch, stored_scale
from d2q_edge.quantize.quantized_layer import QuantizedLayer

CHUNK = 1 << 16
"""Codes whose nearest entries are found at once on a CPU: bounds the memory at about 15 MB, near the caches."""


class TunableLinear(nn.Module):
    """A quantized layer in place of an nn.Linear.

    Attributes:
        log_scales: float32 [rows, blocks].
        latent: float32 [rows, columns] in units of d.
        codebooks: uint8 [rows, columns / 32].
        weights: a parameter [rows, columns]: the present matrix, which gradients are collected for.
    """

    log_scales: torch.Tensor
    latent: torch.Tensor
    codebooks: torch.Tensor

    def __init__(
        self,
        layer: QuantizedLayer,
        search: CodebookSearch,
        bias: torch.Tensor | None,
        dtype: torch.dtype = torch.float32,
        *,
        chunk: int = CHUNK,
    ) -> None:
        """Take over a layer.

        Args:
            layer: the quantized matrix.
            search: of its type, on its device.
            bias: float32 [rows], if it has one; it isn't tuned.
            dtype: what is computed in.
            chunk: codes whose nearest entries are found at once.
        """
        super().__init__()
        self.search, self.kind, self._chunk = search, search.tensor_type, chunk
        self.bias = None if bias is None else bias.detach().to(dtype)
        scales = layer.scales.float()
        self.register_buffer("log_scales", scales.log())
        self.register_buffer("latent", (layer.weights / self._column_scales(scales)).round())
        # The entries that the weights were made of last, where these tell which of them may be others now.
        self._units = self.latent.clone() if self._is_local else None
        self.register_buffer("codebooks", layer.codebooks)
        self.weights = nn.Parameter(layer.weights.to(dtype))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the layer as it was at the last `refresh`."""
        return F.linear(hidden.to(self.weights.dtype), self.weights, self.bias)

    def tuned(self) -> dict[str, torch.Tensor]:
        """Return what may be changed in place before `refresh`, by name."""
        return {"latent": self.latent, "log_scales": self.log_scales}

    @torch.no_grad()
    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the gradients of `tuned`, float32, from that of the weights."""
        gradient, scales = _gradient(self.weights).float(), self.log_scales.exp()
        of_scales = (gradient * self.weights).unflatten(1, (scales.shape[1], -1)).sum(2)
        yield "latent", gradient.mul_(self._column_scales(scales))
        yield "log_scales", of_scales

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the weights of the present scales and latent points."""
        units = self._nearest(self.latent)[0] if self._units is None else self._update(self._units)
        blocks = units.unflatten(1, (self.log_scales.shape[1], -1))
        self.weights.copy_((blocks * self.log_scales.exp()[:, :, None]).flatten(1))

    @torch.no_grad()
    def kept(self) -> dict[str, torch.Tensor]:
        """Return what `restore` makes the present layer of: scales, and the entries in use, int8, in the memory."""
        units = self._nearest(self.latent)[0].to(torch.int8)
        return {"latent": units.cpu(), "log_scales": self.log_scales.cpu().clone()}

    @torch.no_grad()
    def restore(self, kept: dict[str, torch.Tensor]) -> None:
        """Go back to what `kept` returned."""
        for name, tensor in self.tuned().items():
            tensor.copy_(kept[name])
        self.refresh()

    @torch.no_grad()
    def layer(self) -> QuantizedLayer:
        """Return the present blocks, with the scales that can be stored."""
        scales = stored_scale(self.log_scales.exp())
        units, codes = self._nearest(self.latent)
        weights = units * self._column_scales(scales)
        return QuantizedLayer(scales.half(), self.codebooks, codes.byte(), weights)

    def _nearest(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the nearest entries [rows, columns], in units of d, and their codes [rows, codes]."""
        if self.kind.has_codebooks and triton.is_available(values.device):
            return triton.nearest_entries(self.search, values, self.codebooks)
        vectors = self.search.vectors(values)
        units, codes = [], []
        per_chunk = max(1, self._chunk // vectors.shape[1])
        own = self.codebooks.reshape(-1).long()
        for points, codebooks in zip(vectors.split(per_chunk), own.split(per_chunk), strict=True):
            nearest, code = self.search.nearest(points, codebooks)
            units.append(nearest)
            codes.append(code)
        # Back from [groups, codes, V] to columns: the columns of a code are GROUP / V apart.
        flat = torch.cat(units).transpose(1, 2).reshape(-1, GROUP)
        return flat.view(values.shape), torch.cat(codes).view(len(values), -1)

    @property
    def _is_local(self) -> bool:
        """Whether codes don't depend on each other, and are found in torch, one after the other."""
        return not self.kind.windowed and self.latent.device.type == "cpu"

    def _update(self, units: torch.Tensor) -> torch.Tensor:
        """Replace the entries [rows, columns] that may be the nearest no more, in place, and return them."""
        points, entries = self.search.vectors(self.latent), self.search.vectors(units)
        codebooks = self.codebooks.reshape(-1, 1).long()
        far = (points - entries).square().sum(2) >= self.search.safe[codebooks].square()
        chosen = codebooks.expand(far.shape)[far]
        found = [
            self.search.nearest(some[:, None], own)[0]
            for some, own in zip(points[far].split(self._chunk), chosen.split(self._chunk), strict=True)
        ]
        if found:
            # A view of the rows.
            entries[far] = torch.cat(found)[:, 0]
        return units

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

    def tuned(self) -> dict[str, torch.Tensor]:
        """Return what may be changed in place, by name."""
        shift = {} if self.shift is None else {"shift": self.shift.detach()}
        return {"gain": self.gain.detach(), **shift}

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the gradients of `tuned`, float32."""
        yield "gain", _gradient(self.gain)
        if self.shift is not None:
            yield "shift", _gradient(self.shift)

    def refresh(self) -> None:
        """Do nothing: what is tuned is what is used."""

    def kept(self) -> dict[str, torch.Tensor]:
        """Return what `restore` makes the present norm of, in the memory."""
        return {name: tensor.cpu().clone() for name, tensor in self.tuned().items()}

    def restore(self, kept: dict[str, torch.Tensor]) -> None:
        """Go back to what `kept` returned."""
        for name, tensor in self.tuned().items():
            tensor.copy_(kept[name])

    def _bias(self, shift: torch.Tensor) -> torch.Tensor:
        return self.start + shift * self.weight.abs()


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    if parameter.grad is None:
        raise RuntimeError("there is no gradient yet")
    return parameter.grad
