"""Choose block scales and codebooks by squared error: in torch, or on a CUDA device in Triton.

The torch search ranks the codebooks by the table of codebook_table.py and measures a shortlist exactly
(tests/reference_encoder.py searches exhaustively). q4_0, which has two codebooks only, has its own (uniform.py).
"""

import torch
import torch.nn.functional as F

from d2q_edge.formats.tensor_types import TensorType
from d2q_edge.quantize import triton, uniform
from d2q_edge.quantize.codebook_table import EDGE, KNEE, REACH, SCALE_STEPS, SHORTLIST, CodebookTable, stored_scale

CHUNK = 8192
"""Groups per step on a CPU: bounds memory at about 200 MB, and keeps the working set near the caches."""
CUDA_CHUNK = 4 * CHUNK


class CodebookSearch(CodebookTable):
    """The search for the codebooks of one tensor type on one device."""

    def __init__(self, tensor_type: TensorType, device: torch.device | str = "cpu") -> None:
        super().__init__(tensor_type, device)
        self._chunk = CUDA_CHUNK if torch.device(device).type == "cuda" else CHUNK

    def search(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the best codebook of each group.

        Args:
            vectors: float32 [groups, 32 / V, V], in units of d.

        Returns:
            The codebooks, int64 [groups], and their summed squared errors in units of d squared, float32 [groups].
        """
        if not self.tensor_type.switched:
            return uniform.search(vectors)
        if triton.is_available(vectors.device):
            return triton.search(self, vectors)
        codebooks, errors = [], []
        for part in vectors.split(self._chunk):
            candidates = self._rank(part).topk(SHORTLIST, dim=1, largest=False).indices
            shape = (len(part), -1, part.shape[2])
            distances = torch.cdist(part.contiguous(), self.levels[candidates].reshape(shape).contiguous())
            exact = distances.square_().view(len(part), part.shape[1], SHORTLIST, -1).amin(3).sum(1)
            error, best = exact.min(1)
            codebooks.append(candidates.gather(1, best[:, None])[:, 0])
            errors.append(error)
        return torch.cat(codebooks), torch.cat(errors)

    def block_scales(self, weights: torch.Tensor) -> torch.Tensor:
        """Choose the scale d of each block by the ranked error of SCALE_STEPS.

        Args:
            weights: float32 [rows, block_size].

        Returns:
            float32 [rows], positive values that float16 represents exactly.
        """
        if not self.tensor_type.switched:
            return stored_scale(uniform.block_scales(weights))
        vectors = self.vectors(weights)
        if triton.is_available(weights.device):
            return triton.block_scales(self, vectors.reshape(weights.shape))
        base = weights.square().mean(1).sqrt() / self.unit
        best = torch.full_like(base, torch.inf)
        scales = stored_scale(base)
        for factors in SCALE_STEPS:
            center = scales
            for factor in factors:
                trial = stored_scale(center * factor)
                error = trial.square() * self._ranked_error(vectors, trial)
                better = error < best
                best, scales = torch.where(better, error, best), torch.where(better, trial, scales)
        return scales

    def _ranked_error(self, vectors: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Approximate the error of every block at its scale, with the best codebook for each group: [rows]."""
        per_row = len(vectors) // len(scales)
        scaled = vectors / scales.repeat_interleave(per_row)[:, None, None]
        ranked = torch.cat([self._rank(part).amin(1) for part in scaled.split(self._chunk)])
        # The table ends at REACH; beyond it the error grows with the distance from the largest entry.
        size = scaled.abs()
        nearest = (REACH - self.edge) ** 2
        beyond = torch.where(size > REACH, (size - self.edge).square() - nearest, 0.0).sum((1, 2))
        return (ranked + beyond).view(-1, per_row).sum(1)

    def _rank(self, vectors: torch.Tensor) -> torch.Tensor:
        """Approximate the squared error of every codebook for every group: [groups, 256]."""
        position = vectors / (vectors.abs() + KNEE)
        bins = position.mul_(self.bins / 2 / EDGE).add_(self.bins / 2).long().clamp_(0, self.bins - 1)
        index = bins[..., 0] * self.bins + bins[..., 1] if vectors.shape[2] == 2 else bins[..., 0]
        return F.embedding_bag(index, self.rank_table, mode="sum")
