"""Save, load, apply and export the result of quantizing one decoder block as one object.

All names are relative to the block ("self_attn.q_proj"). What follows the last block (final norm and lm_head) is one
more QuantizedBlock, with names relative to the model.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from d2q_edge.formats import tensor_types
from d2q_edge.formats.tensor_file import Array, load_tensors, save_tensors
from d2q_edge.formats.tensor_types import F32, U8, TensorType


@dataclass
class QuantizedWeight:
    """A weight matrix packed in one of our tensor types.

    `values` is the dequantized matrix, float32 [rows, columns], where the quantizer has it at hand; `take_values` drops
    it, so that it isn't kept in memory twice.
    """

    type: TensorType
    data: U8  # packed blocks as in the file [rows, bytes per row]
    values: torch.Tensor | None = field(default=None, repr=False, compare=False)

    def take_values(self, device: torch.device) -> torch.Tensor:
        """Return the dequantized matrix, float32 [rows, columns], on a device."""
        values, self.values = self.values, None
        if values is None:
            values = torch.from_numpy(tensor_types.dequantize(self.type, self.data))
        return values.to(device)


@dataclass
class BlockMetrics:
    """What was measured while a block was quantized.

    Attributes:
        layer_errors: linear layer to the relative squared error of its output, tr(E H E^T) / tr(W H W^T).
        norm_shifts: norm to the statistics of its mean shift (quantize/dac.py), as plain values.
        output_errors: relative squared error of the block's output before and after it was tuned; empty if it wasn't.
    """

    layer_errors: dict[str, float] = field(default_factory=dict)
    norm_shifts: dict[str, dict[str, Any]] = field(default_factory=dict)
    output_errors: list[float] = field(default_factory=list)


@dataclass
class QuantizedBlock:
    """Everything in which a quantized block differs from the checkpoint's.

    Attributes:
        weights: linear layer to its packed weight matrix.
        floats: full name of a parameter ("input_layernorm.weight") to its new value, float32: norm weights, biases and
            routers that absorbed column scales, weights of layers that keep their precision here.
        norm_biases: norm to the bias that corrects its mean shift, float32 [channels].
        column_scales: first layer of a linear group, or the lm_head, to the scales that its columns were divided by,
            float32 [columns].
        metrics: what was measured.
    """

    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    floats: dict[str, F32] = field(default_factory=dict)
    norm_biases: dict[str, F32] = field(default_factory=dict)
    column_scales: dict[str, F32] = field(default_factory=dict)
    metrics: BlockMetrics = field(default_factory=BlockMetrics)

    def update(self, part: "QuantizedBlock") -> None:
        """Take over the results of one step."""
        self.weights.update(part.weights)
        self.floats.update(part.floats)
        self.norm_biases.update(part.norm_biases)
        self.column_scales.update(part.column_scales)
        self.metrics.layer_errors.update(part.metrics.layer_errors)
        self.metrics.norm_shifts.update(part.metrics.norm_shifts)

    def apply(self, block: nn.Module) -> None:
        """Put weights, floats and norm biases into a block whose column scales are absorbed already."""
        for layer, weight in self.weights.items():
            device = block.get_submodule(layer).get_parameter("weight").device
            _set_parameter(block, f"{layer}.weight", weight.take_values(device))
        for name, values in self.floats.items():
            _set_parameter(block, name, torch.from_numpy(values).to(block.get_parameter(name).device))
        for norm, bias in self.norm_biases.items():
            module = block.get_submodule(norm)
            shift = torch.from_numpy(bias).to(module.get_parameter("weight").device)
            module.register_forward_hook(lambda _module, _arguments, output, shift=shift: output + shift)

    def save(self, path: Path) -> None:
        """Write the block to a file; raises as `save_tensors` does."""
        arrays: dict[str, Array] = {f"weights/{layer}": weight.data for layer, weight in self.weights.items()}
        for section, values in self._float_sections().items():
            arrays |= {f"{section}/{name}": array for name, array in values.items()}
        types = {layer: weight.type.name for layer, weight in self.weights.items()}
        save_tensors(path, arrays, {"types": types, "metrics": asdict(self.metrics)})

    @classmethod
    def load(cls, path: Path) -> "QuantizedBlock":
        """Read a block that `save` wrote; raises as `load_tensors` does."""
        arrays, metadata = load_tensors(path)
        block = cls(metrics=BlockMetrics(**metadata["metrics"]))
        sections = block._float_sections()
        for key, array in arrays.items():
            section, _, name = key.partition("/")
            if section == "weights":
                block.weights[name] = QuantizedWeight(tensor_types.BY_NAME[metadata["types"][name]], array)
            else:
                sections[section][name] = array
        return block

    def _float_sections(self) -> dict[str, dict[str, F32]]:
        return {"floats": self.floats, "norm_biases": self.norm_biases, "column_scales": self.column_scales}


def float_array(values: torch.Tensor) -> F32:
    """Return a tensor as a float32 array on the CPU, of the same memory where it is one already."""
    array: F32 = values.detach().float().cpu().numpy()
    return array


def _set_parameter(block: nn.Module, name: str, values: torch.Tensor) -> None:
    module, _, parameter = name.rpartition(".")
    setattr(block.get_submodule(module), parameter, nn.Parameter(values, requires_grad=False))
