"""The codebooks of a tensor type on a device, with the look-up table of the search (DESIGN section 2).

The search bins the values of a group and sums up, per codebook, the squared errors of the bins' centers: a rank of all
256 codebooks, of which only a shortlist is measured exactly. The torch and the Triton search share this table.
"""

import torch

from d2q_edge.formats.codebooks import PAIR_TABLE, SCALAR_TABLE
from d2q_edge.formats.tensor_types import GROUP, SCALE_MAX, SCALE_TINY, TensorType
from d2q_edge.quantize import uniform

SHORTLIST = 3
"""Codebooks per group that are measured exactly. Eight would lower the error by 0.1 % and take three times as long."""
SCALE_STEPS = ((0.7, 1.0, 1.4, 2.0, 2.8, 4.0), (0.84, 1.19), (0.92, 1.09))
"""Block scales that are tried: multiples of the block's RMS over the table's, then, twice, of the best so far."""
REACH, KNEE = 100.0, 48.0
"""The bins end at the magnitude REACH. They are narrow and about equally wide up to KNEE."""
EDGE = REACH / (REACH + KNEE)


def stored_scale(scale: torch.Tensor) -> torch.Tensor:
    """Round positive scales (float32, any shape) to what a block can store: float16, neither zero nor infinite."""
    return scale.clamp(SCALE_TINY, SCALE_MAX).half().float()


class CodebookTable:
    """The codebooks of one tensor type on one device.

    Attributes:
        tensor_type: the block format.
        levels: entries in units of the block scale d, float32 [256, K, V]: K = 16 pairs (V = 2) or K = 8 scalars
            (V = 1). Of q4_0 [2, 16, 1].
        columns: the same, transposed: float32 [256, V, K].
        bins: bins per dimension. Zero for q4_0, as are all attributes below.
        rank_table: squared error of every bin's center in every codebook, float32 [bins ** V, 256].
        short_table: the same in float16, which is read in half the time.
        edge: the largest magnitude of an entry.
        unit: RMS of the entries of the median codebook: d is near the RMS of a block over this.
    """

    def __init__(self, tensor_type: TensorType, device: torch.device | str = "cpu") -> None:
        self.tensor_type = tensor_type
        if tensor_type.switched:
            table = PAIR_TABLE if tensor_type.paired else SCALAR_TABLE[:, :, None]
            self.levels = torch.tensor(table, dtype=torch.float32, device=device)
        else:
            self.levels = uniform.levels(device)
        self.columns = self.levels.transpose(1, 2).contiguous()
        self.bins, self.edge, self.unit = 0, 0.0, 0.0
        self.rank_table = self.short_table = torch.zeros(0, device=device)
        if tensor_type.switched:
            self.bins = 64 if tensor_type.paired else 1024
            self.edge = float(self.levels.abs().max())
            self.unit = float(self.levels.square().mean((1, 2)).sqrt().median())
            self.rank_table = self._make_rank_table()
            self.short_table = self.rank_table.half()

    def vectors(self, weights: torch.Tensor) -> torch.Tensor:
        """Split rows [rows, n * 32] into the vectors that get a code: [rows * n, 32 / V, V], in code order."""
        groups = weights.reshape(-1, GROUP)
        if self.tensor_type.paired:
            return groups.reshape(-1, 2, GROUP // 2).transpose(1, 2)
        return groups[:, :, None]

    def _make_rank_table(self) -> torch.Tensor:
        position = ((torch.arange(self.bins, device=self.levels.device) + 0.5) / (self.bins / 2) - 1) * EDGE
        centers = position * KNEE / (1 - position.abs())
        points = torch.cartesian_prod(centers, centers) if self.levels.shape[2] == 2 else centers[:, None]
        return torch.stack([torch.cdist(points, codebook).square().amin(1) for codebook in self.levels], 1)
