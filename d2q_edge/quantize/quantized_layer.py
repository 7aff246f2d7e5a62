"""Hold the result of quantizing one weight matrix."""

from dataclasses import dataclass

import torch

from d2q_edge.formats.tensor_types import U8, TensorType, code_bytes


@dataclass
class QuantizedLayer:
    """The content of all blocks of one matrix [rows, columns].

    Attributes:
        scales: float16 [rows, columns / block_size].
        codebooks: uint8 [rows, columns / 32].
        codes: uint8 [rows, columns / 2] for paired types, else [rows, columns], in the order of tensor_types.pack.
        weights: float32 [rows, columns], the dequantized matrix.
    """

    scales: torch.Tensor
    codebooks: torch.Tensor
    codes: torch.Tensor
    weights: torch.Tensor

    def packed(self, kind: TensorType) -> torch.Tensor:
        """Pack the blocks as tensor_types.pack, on a CUDA device or the CPU: uint8 [rows, kind.row_bytes(columns)]."""
        rows, blocks = self.scales.shape
        own = self.scales.reshape(-1, 1), self.codebooks.reshape(-1, kind.groups), self.codes
        # Other devices may lack operations on bytes.
        scales, codebooks, codes = (part if part.is_cuda else part.cpu() for part in own)
        codes, selectors = codes.reshape(len(scales), kind.groups, -1), [codebooks]
        if not kind.has_codebooks:
            flipped, selectors = codebooks == 1, []
            scales, codes = torch.where(flipped, -scales, scales), torch.where(flipped[:, :, None], 15 - codes, codes)
        parts = [scales.contiguous().view(torch.uint8), *selectors, *code_bytes(kind, codes)]
        return torch.cat(parts, 1).view(rows, blocks * kind.type_size)

    def pack(self, kind: TensorType) -> U8:
        """Pack the blocks into a numpy array, as `packed`."""
        data: U8 = self.packed(kind).cpu().numpy()
        return data
