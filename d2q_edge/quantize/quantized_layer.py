"""What a quantizer returns for one weight matrix."""

from dataclasses import dataclass

import torch

from d2q_edge.formats.tensor_types import U8, TensorType, code_bytes


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

    def packed(self, kind: TensorType) -> torch.Tensor:
        """The blocks as bytes, uint8 [rows, kind.row_bytes(cols)], as tensor_types.pack; on a CUDA device where the
        layer is on one. (Others may not have all operations for bytes.)"""
        rows, blocks = self.scales.shape
        own = self.scales.reshape(-1, 1), self.codebooks.reshape(-1, kind.groups), self.codes
        scales, books, codes = (part if part.is_cuda else part.cpu() for part in own)
        codes = codes.reshape(len(scales), kind.groups, -1)
        if not kind.switched:
            turned = books == 1
            scales, codes = torch.where(turned, -scales, scales), torch.where(turned[:, :, None], 15 - codes, codes)
        parts = [scales.contiguous().view(torch.uint8), *([books] if kind.switched else []), *code_bytes(kind, codes)]
        return torch.cat(parts, 1).view(rows, blocks * kind.type_size)

    def pack(self, kind: TensorType) -> U8:
        """The same for numpy."""
        data: U8 = self.packed(kind).cpu().numpy()
        return data
