"""What a quantizer returns for one weight matrix."""

from dataclasses import dataclass

import torch

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
        parts = [scales.contiguous().view(torch.uint8), *([books] if kind.switched else []), *_bits(codes, kind)]
        return torch.cat(parts, 1).view(rows, blocks * kind.type_size)

    def pack(self, kind: TensorType) -> U8:
        """The same for numpy."""
        data: U8 = self.packed(kind).cpu().numpy()
        return data


def _bits(codes: torch.Tensor, kind: TensorType) -> list[torch.Tensor]:
    """The bytes of codes [blocks, groups, codes]: of 4-bit ones, or of the low two bits and the high bit of 3-bit ones,
    in parts [blocks, bytes]."""
    count = len(codes)
    if kind.codebook_entries == 16:
        # Pairs: neighbouring groups share bytes; q4_0: the halves of the group.
        halves = codes.view(count, -1, 2, 16)
        return [(halves[:, :, 0] | halves[:, :, 1] << 4).view(count, -1)]
    slots = codes.view(count, -1, 4, 32 if kind.groups == 8 else 16)
    low = torch.stack([(slots[:, :, slot] & 3) << 2 * slot for slot in range(4)])
    slots = codes.view(count, 8, -1)
    high = torch.stack([(slots[:, slot] >> 2) << slot for slot in range(8)])
    # No two of them share a bit.
    return [part.sum(0, dtype=torch.uint8).view(count, -1) for part in (low, high)]
