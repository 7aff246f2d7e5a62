"""Accumulate second moments of the gradients at a layer's outputs: which errors of its rows belong together.

YAQA (arXiv 2505.22988) approximates the loss's second derivatives by a layer's weights as a Kronecker product of the
input's Hessian H (statistics.py) and one of the outputs, the second moments G of the gradients g of the loss:

    G = sum_t g_t g_t^T / |g_t|.

A token counts by the first power of its gradient's norm, not by the second: few tokens would decide (measured).
G's rows are split into pieces whose errors are taken for independent; it would be too large for a wide layer.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from d2q_edge.quantize.matmul import add_gram, mirrored

PIECE = 512
"""Rows of a piece, at most; larger ones gained nothing (measured up to 2,048)."""
TINY = torch.finfo(torch.float32).tiny


def piece_sizes(rows: int) -> list[int]:
    """Return the numbers of rows of the pieces of so many rows: as equal as they can be."""
    count = math.ceil(rows / PIECE)
    return [(number + 1) * rows // count - number * rows // count for number in range(count)]


class OutputHessian:
    """G of the rows of the layers that share an input, one below the other.

    Attributes:
        pieces: float32 [n, n] each; those of all consecutive rows.
    """

    def __init__(self, pieces: Sequence[torch.Tensor]) -> None:
        """Take the pieces."""
        self.pieces = list(pieces)

    @classmethod
    def zeros(cls, rows: int, device: torch.device | str = "cpu") -> "OutputHessian":
        """Start a sum."""
        return cls([torch.zeros(size, size, device=device) for size in piece_sizes(rows)])

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any], name: str) -> "OutputHessian":
        """Return what `to_arrays` has stored under a name, on the CPU."""
        count = sum(key.rpartition(".")[0] == name for key in arrays)
        return cls([torch.from_numpy(arrays[f"{name}.{number}"]) for number in range(count)])

    def to_arrays(self, name: str) -> dict[str, Any]:
        """Return the pieces as arrays to store, float32 [n, n]; a later pass goes on to add to them."""
        return {f"{name}.{number}": piece.cpu().numpy() for number, piece in enumerate(self.pieces)}

    def add_batch(self, gradients: torch.Tensor) -> None:
        """Add the gradients of the loss by the layers' outputs, float32 [tokens, rows]; `complete` is to follow."""
        # The fourth root of the squared norm on either side.
        scaled = gradients * gradients.square().sum(1, keepdim=True).clamp(min=TINY).pow(-0.25)
        for piece, part in zip(self.pieces, scaled.split([len(piece) for piece in self.pieces], dim=1), strict=True):
            add_gram(piece, part)

    def complete(self) -> "OutputHessian":
        """Complete the sums in place after the last batch, and return them."""
        for piece in self.pieces:
            mirrored(piece)
        return self

    def to(self, device: torch.device) -> "OutputHessian":
        """Return it on a device."""
        return OutputHessian([piece.to(device) for piece in self.pieces])

    def scaled(self, factors: torch.Tensor) -> "OutputHessian":
        """Return G of the same layers after their rows are multiplied by factors, float32 [rows]."""
        parts = factors.split([len(piece) for piece in self.pieces])
        return OutputHessian([p / part[:, None] / part for p, part in zip(self.pieces, parts, strict=True)])

    def rows(self, chosen: torch.Tensor) -> "OutputHessian":
        """Return G of some rows, bool [rows]; all others stay as they are."""
        parts = chosen.split([len(piece) for piece in self.pieces])
        return OutputHessian([p[part][:, part] for p, part in zip(self.pieces, parts, strict=True) if bool(part.any())])
