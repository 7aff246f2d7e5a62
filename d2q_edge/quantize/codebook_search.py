"""Choose block scales and codebooks by squared error: in torch, or in compiled code (native/, triton/).

The search bins the values of a group and sums up, per codebook, the squared errors of the bins' centers: a rank of all
256 codebooks, of which only a shortlist is measured exactly (docs/accuracy.md has its cost; tests/reference_encoder.py
searches exhaustively). Where an entry also depends on the code before (windowed types), the rank takes every entry for
possible: a bound from below, so that the shortlist is longer; the Triton kernel, for which it costs little, measures
all codebooks. q4_0, which has two codebooks only, has its own search (uniform.py).
"""

from functools import cached_property

import torch
import torch.nn.functional as F

from d2q_edge.formats import tensor_types
from d2q_edge.formats.codebooks import CODEBOOKS, PAIR_TABLE, SCALAR_TABLE
from d2q_edge.formats.tensor_types import GROUP, SCALE_MAX, SCALE_TINY, TensorType, table_index
from d2q_edge.quantize import native, triton, uniform
from d2q_edge.quantize.trellis import best_codes, by_next_state, path_errors

SHORTLIST = 3
"""Codebooks per group that are measured exactly. Eight would lower the error by 0.1 % and take three times as long."""
WINDOWED_SHORTLIST = 32
"""The same where an entry also depends on the code before: 1.3 % above the best of all, 48 would be 0.5 % above."""
WINDOWED_SCALE = 0.93
"""The rank, a bound from below there, prefers block scales that are too large by this factor (Gaussian weights)."""
WINDOWED_SCALE_STEPS = (0.91, 1.0, 1.08)
"""Multiples of that scale of which the best is taken by the errors that the search finds: 2 % less error of Gaussian
weights in the end, more where an outlier decides the scale."""
SCALE_STEPS = ((0.7, 1.0, 1.4, 2.0, 2.8, 4.0), (0.84, 1.19), (0.92, 1.09))
"""Block scales that are tried: multiples of the block's RMS over the table's, then, twice, of the best so far."""
REACH, KNEE = 100.0, 48.0
"""The bins end at the magnitude REACH. They are narrow and about equally wide up to KNEE."""
EDGE = REACH / (REACH + KNEE)
CHUNK = 8192
"""Groups per step on a CPU: bounds memory at about 200 MB, and keeps the working set near the caches."""
CUDA_CHUNK = 4 * CHUNK


def stored_scale(scale: torch.Tensor) -> torch.Tensor:
    """Round positive scales (float32, any shape) to what a block can store: float16, neither zero nor infinite."""
    return scale.clamp(SCALE_TINY, SCALE_MAX).half().float()


def bin_centers(bins: int, device: torch.device | str) -> torch.Tensor:
    """Return the values at the middle of so many bins, float32 [bins]."""
    position = ((torch.arange(bins, device=device) + 0.5) / (bins / 2) - 1) * EDGE
    return position * KNEE / (1 - position.abs())


class CodebookSearch:
    """The codebooks of one tensor type on one device, and the search among them.

    Attributes:
        tensor_type: the block format.
        levels: entries in units of the block scale d, float32 [256, K, V]: K = 16 pairs (V = 2), or K = 16 scalars
            (V = 1), 8 for each state of a trellis. Of q4_0 [2, 16, 1].
        columns: the same, transposed: float32 [256, V, K].
        safe: half of the least distance between two entries of a codebook, float32 [256, or 2]: what is nearer to an
            entry than that has none that is nearer still. Of windowed types empty.
        ways: scalars' entries by next state, float32 [256, 2, 8] (trellis.py); of other types empty.
        planes: scalars' entries of all codebooks by index, float32 [16, 256]; of other types empty.
        bins: bins per dimension. Zero for q4_0, as are all attributes below.
        error_table: squared error of every bin's center in every codebook, float32 [bins ** V, 256].
        error_table_f16: the same in float16, which is read in half the time.
        edge: the largest magnitude of an entry.
        unit: RMS of the entries of the median codebook: d is near the RMS of a block over this.
    """

    def __init__(
        self, tensor_type: TensorType, device: torch.device | str = "cpu", *, exhaustive: bool = False
    ) -> None:
        """Prepare the tables.

        Args:
            tensor_type: the block format.
            device: where the tables are, and what is searched for.
            exhaustive: measure all codebooks of a windowed type in torch too.
        """
        self.tensor_type = tensor_type
        self._exhaustive = exhaustive
        self._shortlist = WINDOWED_SHORTLIST if tensor_type.windowed else SHORTLIST
        if tensor_type.windowed and exhaustive:
            self._shortlist = CODEBOOKS
        self._chunk = CUDA_CHUNK if torch.device(device).type == "cuda" else CHUNK
        if tensor_type.has_codebooks:
            table = PAIR_TABLE if tensor_type.paired else SCALAR_TABLE[:, :, None]
            self.levels = torch.tensor(table, dtype=torch.float32, device=device)
        else:
            self.levels = uniform.levels(device)
        self.columns = self.levels.transpose(1, 2).contiguous()
        self.ways = self.planes = torch.zeros(0, device=device)
        if tensor_type.windowed:
            self.ways, self.planes = by_next_state(self.levels[..., 0]), self.levels[..., 0].T.contiguous()
        self.safe = torch.zeros(0, device=device)
        if not tensor_type.windowed:
            apart = (self.levels[:, :, None] - self.levels[:, None]).square().sum(3)
            # Equal entries, and each to itself, are as good as each other.
            self.safe = torch.where(apart > 0, apart, torch.inf).amin((1, 2)).sqrt() / 2
        self.bins, self.edge, self.unit = 0, 0.0, 0.0
        self.error_table = self.error_table_f16 = torch.zeros(0, device=device)
        if tensor_type.has_codebooks:
            self.bins = 64 if tensor_type.paired else 1024
            self.edge = float(self.levels.abs().max())
            self.unit = float(self.levels.square().mean((1, 2)).sqrt().median())
            self.error_table = self._make_error_table()
            self.error_table_f16 = self.error_table.half()

    @cached_property
    def native_tables(self) -> "native.Tables":
        """What the C code reads; on a CPU only."""
        return native.Tables(self, exhaustive=self._exhaustive)

    def vectors(self, weights: torch.Tensor) -> torch.Tensor:
        """Split rows [rows, n * 32] into the vectors that get a code: [rows * n, 32 / V, V], in code order."""
        groups = weights.reshape(-1, GROUP)
        if self.tensor_type.paired:
            return groups.reshape(-1, 2, GROUP // 2).transpose(1, 2)
        return groups[:, :, None]

    def search(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the best codebook of each group.

        Args:
            vectors: float32 [groups, 32 / V, V], in units of d.

        Returns:
            The codebooks, int64 [groups], and their summed squared errors in units of d squared, float32 [groups].
        """
        if not self.tensor_type.has_codebooks:
            return uniform.search(vectors)
        if triton.is_available(vectors.device):
            return triton.search(self, vectors)
        if native.is_available(self.tensor_type, vectors.device):
            return native.search(self, vectors)
        codebooks, errors = [], []
        for part in vectors.split(self._chunk):
            candidates = self._approximate_errors(part).topk(self._shortlist, dim=1, largest=False).indices
            if self.tensor_type.windowed:
                exact = path_errors(part[:, :, 0], self.ways[candidates])
            else:
                shape = (len(part), -1, part.shape[2])
                distances = torch.cdist(part.contiguous(), self.levels[candidates].reshape(shape).contiguous())
                exact = distances.square_().view(len(part), part.shape[1], self._shortlist, -1).amin(3).sum(1)
            error, best = exact.min(1)
            codebooks.append(candidates.gather(1, best[:, None])[:, 0])
            errors.append(error)
        return torch.cat(codebooks), torch.cat(errors)

    def nearest(self, vectors: torch.Tensor, codebooks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the nearest entries of given codebooks.

        Args:
            vectors: float32 [groups, 32 / V, V], in units of d; of a type that isn't windowed also fewer per group.
            codebooks: int64 [groups].

        Returns:
            The entries, float32 like the vectors, and the codes, int64 [groups, 32 / V].
        """
        levels = self.levels[codebooks]
        whole = vectors[0].numel() == GROUP if len(vectors) else False
        if whole and native.is_available(self.tensor_type, vectors.device):
            codes = native.nearest_codes(self, vectors, codebooks)
        elif self.tensor_type.windowed:
            codes = best_codes(vectors[:, :, 0], self.ways, codebooks)
        else:
            codes = (vectors[:, :, None] - levels[:, None]).square().sum(3).argmin(2)
        index = table_index(codes) if self.tensor_type.windowed else codes
        return levels.gather(1, index.long()[:, :, None].expand(-1, -1, levels.shape[2])), codes.long()

    def block_scales(self, weights: torch.Tensor) -> torch.Tensor:
        """Choose the scale d of each block by the approximate error of SCALE_STEPS; of windowed types then corrected.

        Args:
            weights: float32 [rows, block_size].

        Returns:
            float32 [rows], positive values that float16 represents exactly.
        """
        if not self.tensor_type.has_codebooks:
            return stored_scale(uniform.block_scales(weights))
        vectors = self.vectors(weights)
        if native.is_available(self.tensor_type, weights.device):
            return native.block_scales(self, vectors.reshape(weights.shape))
        if triton.is_available(weights.device):
            scales = triton.block_scales(self, vectors.reshape(weights.shape))
        else:
            scales = self._approximate_scales(weights, vectors)
        return self._correct_scales(vectors, scales) if self.tensor_type.windowed else scales

    def _approximate_scales(self, weights: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        base = weights.square().mean(1).sqrt() / self.unit
        best = torch.full_like(base, torch.inf)
        scales = stored_scale(base)
        for factors in SCALE_STEPS:
            center = scales
            for factor in factors:
                trial = stored_scale(center * factor)
                error = trial.square() * self._approximate_block_error(vectors, trial)
                better = error < best
                best, scales = torch.where(better, error, best), torch.where(better, trial, scales)
        return scales

    def _correct_scales(self, vectors: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Correct the approximate scales [rows] of windowed types by the errors that the search finds."""
        blocks = vectors.reshape(len(scales), -1)
        trials = torch.stack([stored_scale(scales * (WINDOWED_SCALE * step)) for step in WINDOWED_SCALE_STEPS])
        _, errors = self.search((blocks / trials[:, :, None]).view(-1, GROUP, 1))
        best = (errors.view(*trials.shape, -1).sum(2) * trials.square()).argmin(0, keepdim=True)
        return trials.gather(0, best)[0]

    def _approximate_block_error(self, vectors: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Approximate the error of every block at its scale, with the best codebook for each group: [rows]."""
        per_row = len(vectors) // len(scales)
        scaled = vectors / scales.repeat_interleave(per_row)[:, None, None]
        errors = torch.cat([self._approximate_errors(part).amin(1) for part in scaled.split(self._chunk)])
        # The table ends at REACH; beyond it the error grows with the distance from the largest entry.
        size = scaled.abs()
        nearest = (REACH - self.edge) ** 2
        beyond = torch.where(size > REACH, (size - self.edge).square() - nearest, 0.0).sum((1, 2))
        return (errors + beyond).view(-1, per_row).sum(1)

    def _approximate_errors(self, vectors: torch.Tensor) -> torch.Tensor:
        """Approximate the squared error of every codebook for every group: [groups, 256]."""
        position = vectors / (vectors.abs() + KNEE)
        bins = position.mul_(self.bins / 2 / EDGE).add_(self.bins / 2).long().clamp_(0, self.bins - 1)
        index = bins[..., 0] * self.bins + bins[..., 1] if vectors.shape[2] == 2 else bins[..., 0]
        return F.embedding_bag(index, self.error_table, mode="sum")

    def _make_error_table(self) -> torch.Tensor:
        centers = bin_centers(self.bins, self.levels.device)
        points = torch.cartesian_prod(centers, centers) if self.levels.shape[2] == 2 else centers[:, None]
        return torch.stack([torch.cdist(points, codebook).square().amin(1) for codebook in self.levels], 1)


class Searches:
    """The searches of all tensor types on one device, each made when it is first asked for by the type's name."""

    def __init__(self, device: torch.device) -> None:
        """Make none yet."""
        self._device = device
        self._made: dict[str, CodebookSearch] = {}

    def __getitem__(self, type_name: str) -> CodebookSearch:
        if type_name not in self._made:
            self._made[type_name] = CodebookSearch(tensor_types.BY_NAME[type_name], self._device)
        return self._made[type_name]
