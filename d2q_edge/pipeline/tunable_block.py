"""Put a quantized block together again so that its scales, codes and norms can be tuned (quantize/tunable.py)."""

from __future__ import annotations

import torch
from torch import nn

from d2q_edge.formats import tensor_types
from d2q_edge.formats.quantized_block import QuantizedBlock, QuantizedWeight, float_array
from d2q_edge.model.blocks import BlockRunner
from d2q_edge.model.families import Family
from d2q_edge.quantize.codebook_search import Searches
from d2q_edge.quantize.quantized_layer import QuantizedLayer
from d2q_edge.quantize.refine import Tunable
from d2q_edge.quantize.tunable import TunableLinear, TunableNorm


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return what forward and backward passes multiply matrices in; many CPUs are slower in bfloat16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


class TunableBlock:
    """A quantized decoder block whose layers and norms are tunable, by their names in the block."""

    def __init__(
        self, runner: BlockRunner, index: int, module: nn.Module, block: QuantizedBlock, searches: Searches
    ) -> None:
        """Replace layers and norms of a module.

        Args:
            runner: of the original model's blocks.
            index: number of the block.
            module: the original block; it is changed, but not its tensors.
            block: what quantizing it gave.
            searches: on the runner's device.
        """
        self.runner, self.module, self._block = runner, module, block
        QuantizedBlock(floats=block.floats).apply(module)
        dtype = compute_dtype(runner.device)
        self.linears: dict[str, TunableLinear] = {}
        for layer, weight in block.weights.items():
            bias = getattr(module.get_submodule(layer), "bias", None)
            quantized = _unpack(weight, runner.device)
            self.linears[layer] = TunableLinear(quantized, searches[weight.type.name], bias, dtype)
        names = dict.fromkeys([*biased_norms(runner.family, index), *runner.family.block_norms(index)])
        self.norms = make_norms(runner.family, module, block, list(names), biased_norms(runner.family, index))
        for name, tunable in (*self.linears.items(), *self.norms.items()):
            _replace(module, name, tunable)

    def layers(self, prefix: str = "") -> dict[str, Tunable]:
        """Return everything that is tuned, by name with a prefix."""
        linears: dict[str, Tunable] = {prefix + name: layer for name, layer in self.linears.items()}
        return linears | {prefix + name: norm for name, norm in self.norms.items()}

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run the block on its input, float32 [windows, context, hidden]."""
        with torch.autocast(hidden.device.type, torch.bfloat16, compute_dtype(hidden.device) == torch.bfloat16):
            return self.runner.forward(self.module, hidden)

    def result(self) -> QuantizedBlock:
        """Return the block as it is now."""
        before = self._block
        result = QuantizedBlock(column_scales=before.column_scales, metrics=before.metrics)
        result.floats |= before.floats
        for layer, weight in before.weights.items():
            result.weights[layer] = QuantizedWeight(weight.type, self.linears[layer].layer().pack(weight.type))
        add_norms(result, self.norms)
        return result


def biased_norms(family: Family, index: int) -> list[str]:
    """Return the norms of a block that get a bias: all that read the residual stream."""
    return [group.norm for group in family.block_groups(index) if group.norm is not None]


def make_norms(
    family: Family, module: nn.Module, block: QuantizedBlock, names: list[str], biased: list[str]
) -> dict[str, TunableNorm]:
    """Wrap norms of a module, those in `biased` with a bias, starting from a block's biases."""
    norms = {}
    for name in names:
        norm = module.get_submodule(name)
        device = norm.get_parameter("weight").device
        start = torch.from_numpy(block.norm_biases[name]).to(device) if name in block.norm_biases else None
        norms[name] = TunableNorm(norm, start, biased=name in biased, offset=family.norm_offset)
    return norms


def add_norms(result: QuantizedBlock, norms: dict[str, TunableNorm]) -> None:
    """Add weights and biases of tuned norms to a block."""
    for name, norm in norms.items():
        tensors = norm.tensors()
        result.floats[f"{name}.weight"] = float_array(tensors["weight"])
        if "bias" in tensors:
            result.norm_biases[name] = float_array(tensors["bias"])


def _unpack(weight: QuantizedWeight, device: torch.device) -> QuantizedLayer:
    parts = tensor_types.unpack(weight.type, weight.data)
    scales, codebooks, codes = (torch.from_numpy(part).to(device) for part in parts)
    return QuantizedLayer(scales, codebooks, codes, weight.take_values(device))


def _replace(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, layer)
