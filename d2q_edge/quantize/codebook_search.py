"""Choosing block scales and codebooks for groups of weights (DESIGN section 2), vectorized in torch.

Knows the two tables and how to find, for many groups at once, the codebook with the least squared error. Does not know
about error feedback (gptaq.py) or bytes (tensor_types.py). The exhaustive search, 256 codebooks times 16 entries for
every pair, is the reference (encoder.py does it in numpy); here a look-up table of the errors of binned vectors ranks
the codebooks, and only a shortlist is measured exactly. q4_0, which has no table, has its own search (uniform.py).
"""

import torch
import torch.nn.functional as F

from d2q_edge.formats.codebooks import PAIR_TABLE, SCALAR_TABLE
from d2q_edge.formats.tensor_types import GROUP, SCALE_MAX, SCALE_TINY, TensorType
from d2q_edge.quantize import uniform
from d2q_edge.quantize.triton.support import has_triton

SHORTLIST = 3
"""Codebooks per group whose error is measured exactly, best ranks first. Eight would make the mean squared error 0.1 %
smaller, and the search three times as long."""
SCALE_STEPS = ((0.7, 1.0, 1.4, 2.0, 2.8, 4.0), (0.84, 1.19), (0.92, 1.09))
"""Block scales that are tried: multiples of the block's RMS over the table's, then, twice, of the best so far."""
CHUNK = 8192
"""Groups per step of a search: bounds memory at about 200 MB, and keeps the working set near the caches."""
CUDA_CHUNK = 4 * CHUNK
"""The same on a GPU, which is faster with more of them at a time."""
REACH, KNEE = 100.0, 48.0
"""The look-up table's bins end at this magnitude; they are narrow, and equally wide, up to about that one."""
EDGE = REACH / (REACH + KNEE)


def stored_scale(scale: torch.Tensor) -> torch.Tensor:
    """Round positive scales (float32, any shape) to what a block can store: float16, neither zero nor infinite."""
    return scale.clamp(SCALE_TINY, SCALE_MAX).half().float()


class CodebookSearch:
    """The table of one tensor type on one device, with what a fast search needs.

    Attributes:
        levels: float32 [256, K, V]: V = 2 and K = 16 for pairs, V = 1 and K = 8 for scalars, in units of d. Of q4_0
            [2, 16, 1].
        columns: the same, float32 [256, V, K].
        rank_table: float32 [bins ** V, 256], squared error of every bin's centre in every codebook. Not of q4_0.
        short_table: the same, float16, which takes half the time to read.
        edge: the largest magnitude of an entry. Not of q4_0.
        unit: RMS of the entries of the median codebook: d is near the RMS of a block over this. Not of q4_0.
    """

    def __init__(self, tensor_type: TensorType, device: torch.device | str = "cpu") -> None:
        self.tensor_type = tensor_type
        self._chunk = CUDA_CHUNK if torch.device(device).type == "cuda" else CHUNK
        if not tensor_type.switched:
            self.levels = self.rank_table = self.short_table = uniform.levels(device)
            self.columns = self.levels.transpose(1, 2).contiguous()
            return
        table = PAIR_TABLE if tensor_type.paired else SCALAR_TABLE[:, :, None]
        self.levels = torch.tensor(table, dtype=torch.float32, device=device)
        self.columns = self.levels.transpose(1, 2).contiguous()
        self.edge = float(self.levels.abs().max())
        self.unit = float(self.levels.square().mean((1, 2)).sqrt().median())
        self._bins = 64 if tensor_type.paired else 1024
        self.rank_table = self._make_rank_table()
        self.short_table = self.rank_table.half()

    def vectors(self, weights: torch.Tensor) -> torch.Tensor:
        """Split rows [rows, n * 32] into the vectors that get a code: [rows * n, 32 / V, V], in code order."""
        groups = weights.reshape(-1, GROUP)
        if self.tensor_type.paired:
            return groups.reshape(-1, 2, GROUP // 2).transpose(1, 2)
        return groups[:, :, None]

    def search(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The best codebook of each group.

        Args:
            vectors: float32 [groups, 32 / V, V], in units of d.

        Returns:
            int64 [groups], the codebooks, and float32 [groups], their summed squared errors in units of d squared.
        """
        if not self.tensor_type.switched:
            return uniform.search(vectors)
        if has_triton(vectors.device):
            from d2q_edge.quantize.triton import codebook_search

            return codebook_search.search(self, vectors)
        books, errors = [], []
        for part in vectors.split(self._chunk):
            candidates = self._rank(part).topk(SHORTLIST, dim=1, largest=False).indices
            shape = (len(part), -1, part.shape[2])
            distances = torch.cdist(part.contiguous(), self.levels[candidates].reshape(shape).contiguous())
            exact = distances.square_().view(len(part), part.shape[1], SHORTLIST, -1).amin(3).sum(1)
            error, best = exact.min(1)
            books.append(candidates.gather(1, best[:, None])[:, 0])
            errors.append(error)
        return torch.cat(books), torch.cat(errors)

    def block_scales(self, weights: torch.Tensor) -> torch.Tensor:
        """The scale d of each block, by the ranked error of SCALE_STEPS.

        Args:
            weights: float32 [rows, block_size].

        Returns:
            float32 [rows], values that float16 holds exactly, never zero.
        """
        if not self.tensor_type.switched:
            return stored_scale(uniform.block_scales(weights))
        if has_triton(weights.device):
            from d2q_edge.quantize.triton import codebook_search

            return codebook_search.block_scales(self, self.vectors(weights).reshape(weights.shape))
        base = weights.square().mean(1).sqrt() / self.unit
        vectors = self.vectors(weights)
        best = torch.full_like(base, torch.inf)
        scales = stored_scale(base)
        for factors in SCALE_STEPS:
            centre = scales
            for factor in factors:
                trial = stored_scale(centre * factor)
                error = trial.square() * self._ranked_error(vectors, trial)
                better = error < best
                best, scales = torch.where(better, error, best), torch.where(better, trial, scales)
        return scales

    def _ranked_error(self, vectors: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Approximate error of every block at its scale, with the best codebook for each group: [rows]."""
        per_row = len(vectors) // len(scales)
        scaled = vectors / scales.repeat_interleave(per_row)[:, None, None]
        ranked = torch.cat([self._rank(part).amin(1) for part in scaled.split(self._chunk)])
        # The rank table ends at REACH; beyond it the error grows with the distance from the largest entry.
        size = scaled.abs()
        nearest = (REACH - self.edge) ** 2
        beyond = torch.where(size > REACH, (size - self.edge).square() - nearest, 0.0).sum((1, 2))
        return (ranked + beyond).view(-1, per_row).sum(1)

    def _rank(self, vectors: torch.Tensor) -> torch.Tensor:
        """Approximate squared errors of every codebook for every group: [groups, 256]."""
        bins = self._bin(vectors)
        index = bins[..., 0] * self._bins + bins[..., 1] if vectors.shape[2] == 2 else bins[..., 0]
        return F.embedding_bag(index, self.rank_table, mode="sum")

    def _bin(self, values: torch.Tensor) -> torch.Tensor:
        """Bin of each value: narrow near zero, where entries are dense, wide towards REACH."""
        position = values / (values.abs() + KNEE)
        return position.mul_(self._bins / 2 / EDGE).add_(self._bins / 2).long().clamp_(0, self._bins - 1)

    def _make_rank_table(self) -> torch.Tensor:
        """Squared error of every bin's centre in every codebook: [bins ** V, 256]."""
        position = ((torch.arange(self._bins, device=self.levels.device) + 0.5) / (self._bins / 2) - 1) * EDGE
        centres = position * KNEE / (1 - position.abs())
        points = torch.cartesian_prod(centres, centres) if self.levels.shape[2] == 2 else centres[:, None]
        return torch.stack([torch.cdist(points, book).square().amin(1) for book in self.levels], 1)
