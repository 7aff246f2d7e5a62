"""What a quantizer returns for one weight matrix."""

from dataclasses import dataclass

import torch

from d2q_edge import tensor_types
from d2q_edge.tensor_types import U8, TensorType


@dataclass
class QuantizedLayer:
    """The content of all blocks of one matrix [rows, cols].

    Attributes:
        scales: float16 [rows, cols / block_size].
        codebooks: uint8 [rows, cols / 32].
        codes: uint8 [rows, cols / 2] for paired types, else [rows, cols], in the order of tensor_types.pack.
        weights: float32 [rows, cols], the dequantized matrix.
    """

    scales: torch.Tensor
    codebooks: torch.Tensor
    codes: torch.Tensor
    weights: torch.Tensor

    def pack(self, kind: TensorType) -> U8:
        """The blocks as bytes, uint8 [rows, kind.row_bytes(cols)]."""
        return tensor_types.pack(kind, *(part.cpu().numpy() for part in (self.scales, self.codebooks, self.codes)))
