"""Make one block of columns to quantize, with rows of all kinds."""

from dataclasses import dataclass, fields

import torch

from d2q_edge.formats.tensor_types import TensorType


@dataclass
class Block:
    """One block of columns of a matrix, in processing order, and the factors of the Hessian."""

    weights: torch.Tensor
    U: torch.Tensor
    P: torch.Tensor
    hessian: torch.Tensor
    noise: torch.Tensor

    @classmethod
    def make(cls, kind: TensorType, rows: int) -> "Block":
        generator = torch.Generator().manual_seed(rows)
        size = kind.block_size

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        weights = normal(rows, size) * (0.2 + torch.rand(size, generator=generator))
        # Nothing, next to nothing, more than float16 holds, and an outlier.
        weights[:4] *= torch.tensor([0, 1e-9, 1e6, 1])[:, None]
        weights[3, 5] = 40
        wide = normal(size, 3 * size)
        return cls(
            weights,
            normal(size, size).triu(1) * 0.1 + torch.diag(1 + torch.rand(size, generator=generator)),
            normal(size, size).triu(1) * 0.05,
            wide @ wide.T / size + 0.1 * torch.eye(size),
            normal(rows, size),
        )

    def to(self, device: torch.device) -> "Block":
        return Block(*(getattr(self, field.name).to(device) for field in fields(self)))
