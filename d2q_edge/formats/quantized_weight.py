"""A weight matrix packed in one of our tensor types, with its bytes as they are in the file."""

from dataclasses import dataclass, field

import torch

from d2q_edge.formats import tensor_types
from d2q_edge.formats.tensor_types import U8, TensorType


@dataclass
class QuantizedWeight:
    """The blocks of one matrix.

    Attributes:
        type: the tensor type.
        data: the packed blocks, uint8 [rows, bytes per row].
        values: the dequantized matrix, float32 [rows, columns], where the quantizer has it at hand; `take_values` drops
            it, so that it isn't kept in memory twice.
    """

    type: TensorType
    data: U8
    values: torch.Tensor | None = field(default=None, repr=False, compare=False)

    def take_values(self, device: torch.device) -> torch.Tensor:
        """Return the dequantized matrix, float32 [rows, columns], on a device."""
        values, self.values = self.values, None
        if values is None:
            values = torch.from_numpy(tensor_types.dequantize(self.type, self.data))
        return values.to(device)
