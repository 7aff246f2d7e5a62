"""Improve a quantized layer by coordinate descent: scales, codebooks and codes, all towards the layer's output.

Error feedback (gptaq.py) decides every weight once, from left to right. Then each part of the layer can be chosen anew,
given the rest. GPTAQ approximates

    minimize tr((Q - T) H (Q - T)^T),    T = W + alpha W dXXT inv(H),

with H damped. Two moves are repeated:
- All block scales of a row: Q = sum_b d_b u_b is linear in the scales d_b, which makes it a least-squares problem.
- The codebook and codes of a group, given all other groups (block coordinate descent as in CDQuant, arXiv 2406.17542):
  the group's unrounded optimum is t = q - g inv(H_gg), with g its part of (Q - T) H. Error feedback inside the group
  finds codes for the present codebook and for the one nearest to t, which are kept where the objective falls; native/
  tries eight near ones.
Neither raises the objective, but for the rounding of a scale to float16.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from d2q_edge.formats.tensor_types import GROUP
from d2q_edge.quantize import native, triton
from d2q_edge.quantize.codebook_search import CodebookSearch, stored_scale
from d2q_edge.quantize.feedback import diagonal_blocks, invert_code_blocks, quantize_group
from d2q_edge.quantize.gptaq import Feedback
from d2q_edge.quantize.lazy_update import LazyUpdate, spans
from d2q_edge.quantize.matmul import integer_product, product
from d2q_edge.quantize.quantized_layer import QuantizedLayer
from d2q_edge.quantize.statistics import InputStatistics


@dataclass(frozen=True)
class DampedHessian:
    """H with damping, which is the same for all rows of a layer.

    Attributes:
        matrix: H, float32 [columns, columns].
        factors: those of every group, from `group_factors`, by block.
    """

    matrix: torch.Tensor
    factors: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, statistics: InputStatistics, feedback: Feedback, search: CodebookSearch) -> "DampedHessian":
        """Prepare H of a layer's input; `feedback` and `search` are as given to `quantize_layer`."""
        hessian = statistics.hessian
        hessian.diagonal().add_(feedback.damping)
        blocks = len(hessian) // search.tensor_type.block_size
        factors = group_factors(hessian, search.levels.shape[2])
        return cls(hessian, tuple(factor.unflatten(0, (blocks, -1)) for factor in factors))


def descend(
    layer: QuantizedLayer, target: torch.Tensor, hessian: DampedHessian, search: CodebookSearch, rounds: int
) -> QuantizedLayer:
    """Improve a quantized matrix by `rounds` of both moves, after which the scales are fitted once more.

    Args:
        layer: from `quantize_layer`; it stays as it is.
        target: T, float32 [rows, columns], from `Feedback.target`.
        hessian: of the layer's input.
        search: as given to `quantize_layer`.
        rounds: of both moves; with none the layer is returned.
    """
    if not rounds:
        return layer
    descent = CoordinateDescent(layer, target, hessian, search)
    for _ in range(rounds):
        descent.fit_scales()
        descent.choose_codes()
    descent.fit_scales()
    return descent.layer()


class CoordinateDescent:
    """One layer during the descent; arguments as of `descend`.

    Attributes:
        scales: float32 [rows, blocks].
        codebooks, codes: int64 [rows, blocks, groups], uint8 [rows, blocks, codes].
        units: the table's entries, float32 [rows, columns]: Q = units * scales.
    """

    def __init__(
        self, layer: QuantizedLayer, target: torch.Tensor, hessian: DampedHessian, search: CodebookSearch
    ) -> None:
        self.search, self.kind = search, search.tensor_type
        self.hessian, self._group_factors = hessian.matrix, hessian.factors
        self.target = target
        self._target_hessian = product(self.target, self.hessian)
        blocks = layer.scales.shape[1]
        self.scales = layer.scales.float()
        self.codebooks = layer.codebooks.long().unflatten(1, (blocks, -1))
        self.codes = layer.codes.clone().unflatten(1, (blocks, -1))
        # Entries are integers, which the division may miss by a rounding error.
        self.units = (layer.weights / self._column_scales()).round()

    def layer(self) -> QuantizedLayer:
        """Return the layer as it is now."""
        codebooks, codes = self.codebooks.byte().flatten(1), self.codes.flatten(1)
        return QuantizedLayer(self.scales.half(), codebooks, codes, self.quantized())

    def quantized(self) -> torch.Tensor:
        """Return Q, float32 [rows, columns]."""
        return self.units * self._column_scales()

    def fit_scales(self) -> None:
        """Fit all block scales of every row by least squares.

        A scale stays as it is where it would change by more than a factor of two: its block is all but empty, with
        weights or inputs of zero, or its codes don't fit its weights.
        """
        rows, columns = self.units.shape
        size = self.kind.block_size
        blocks = columns // size
        matrix = torch.empty(rows, blocks, blocks, device=self.units.device)
        for block in range(blocks):
            # The matrix is symmetric.
            here, later = slice(block * size, (block + 1) * size), slice(block * size, None)
            seen = integer_product(self.units[:, here], self.hessian[here, later])
            matrix[:, block, block:] = (seen * self.units[:, later]).view(rows, blocks - block, size).sum(2)
            matrix[:, block:, block] = matrix[:, block, block:]
        right = (self._target_hessian * self.units).view(rows, blocks, size).sum(2)
        # A block of zeros must not make it singular.
        matrix.diagonal(dim1=1, dim2=2).mul_(1 + 1e-6).add_(1e-12)
        solution = torch.linalg.solve_ex(matrix, right[:, :, None]).result[:, :, 0]
        plausible = self._plausible(solution)
        if not bool(plausible.all()):
            # Solve for the others again, given those that stay.
            staying = torch.where(plausible, 0.0, self.scales)
            right = torch.where(plausible, right - (matrix @ staying[:, :, None])[:, :, 0], self.scales)
            identity = torch.eye(blocks, device=matrix.device)
            matrix = torch.where(plausible[:, :, None] & plausible[:, None], matrix, identity)
            solution = torch.linalg.solve_ex(matrix, right[:, :, None]).result[:, :, 0]
        accepted = self._plausible(solution).all(1, keepdim=True)
        self.scales = torch.where(accepted, stored_scale(solution), self.scales)

    def _plausible(self, solution: torch.Tensor) -> torch.Tensor:
        return (solution > self.scales / 2) & (solution < self.scales * 2)

    def choose_codes(self) -> None:
        """Choose codebook and codes of one group after another, in storage order."""
        size = self.kind.block_size
        gradient = product(self.quantized() - self.target, self.hessian)
        for begin, end in spans(self.units.shape[1], size, gradient.device):
            update = LazyUpdate(gradient[:, begin:end], gradient[:, end:], [self.hessian[begin:end, begin:]])
            for block in range(begin // size, end // size):
                here = slice(block * size, (block + 1) * size)
                scale = self.scales[:, block, None]
                before = self.units[:, here].clone()
                state = before, self.codebooks[:, block], self.codes[:, block]
                factors = [factor[block] for factor in self._group_factors]
                self.units[:, here], self.codebooks[:, block], self.codes[:, block] = choose_block(
                    self.search, gradient[:, here] / scale, *state, self.hessian[here, here], factors
                )
                update.add((self.units[:, here] - before) * scale)
            update.finish()

    def _column_scales(self) -> torch.Tensor:
        return self.scales.repeat_interleave(self.kind.block_size, 1)


def group_factors(hessian: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Factor the Hessian of every group, for codes of `width` columns V.

    Args:
        hessian: H, float32 [n, n].

    Returns:
        float32: inv(H_gg) in storage order [groups, 32, 32], its upper Cholesky factor U in processing order
        [groups, 32, 32], and the inverses of U's diagonal blocks [groups, 32 / V, V, V].
    """
    order = _group_order(width, hessian.device)
    # The _ex variants don't check and so don't wait for the GPU; with damping they can't fail.
    inv_H_gg = torch.cholesky_inverse(torch.linalg.cholesky_ex(diagonal_blocks(hessian)).L)
    U = torch.linalg.cholesky_ex(inv_H_gg[:, order][:, :, order], upper=True).L
    return inv_H_gg, U, invert_code_blocks(U, width)


def choose_block(
    search: CodebookSearch,
    gradient: torch.Tensor,
    units: torch.Tensor,
    codebooks: torch.Tensor,
    codes: torch.Tensor,
    hessian: torch.Tensor,
    factors: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return new units, codebooks and codes of one block of all rows, by one compiled kernel where there is one.

    Args:
        search: the codebooks.
        gradient: (Q - T) H in units of d, float32 [rows, block_size].
        units, codebooks, codes: of the block as it is.
        hessian: H of the block's columns, float32 [block_size, block_size].
        factors: those of the block's groups, from `group_factors`.
    """
    if triton.is_available(units.device):
        return triton.choose_block(search, gradient, units, codebooks, codes, hessian, *factors)
    if native.is_available(search.tensor_type, units.device):
        return native.choose_block(search, gradient, units, codebooks, codes, hessian, *factors)
    rows, per_group = len(units), codes.shape[1] // codebooks.shape[1]
    order = _group_order(search.levels.shape[2], units.device)
    gradient, units, codebooks, codes = gradient.clone(), units.clone(), codebooks.clone(), codes.clone()
    for group, (inv_H_gg, U, inv_U_jj) in enumerate(zip(*factors, strict=True)):
        here, place = slice(group * GROUP, (group + 1) * GROUP), slice(group * per_group, (group + 1) * per_group)
        before, H_gg = units[:, here].clone(), hessian[here, here]
        optimum = before - gradient[:, here] @ inv_H_gg
        error = ((before - optimum) @ H_gg * (before - optimum)).sum(1)
        nearest, _ = search.search(search.vectors(optimum))
        # Both candidates at once, one below the other.
        candidates, wanted = torch.cat([codebooks[:, group], nearest]), optimum.repeat(2, 1)
        one, rounded = torch.ones_like(wanted[:, 0]), torch.empty_like(wanted)
        found, rounded[:, order], _, _ = quantize_group(wanted[:, order], search, candidates, one, U, inv_U_jj)
        off = rounded - wanted
        least, which = ((off @ H_gg) * off).sum(1).view(2, -1).min(0)
        better, pick = least < error, which * rows + torch.arange(rows, device=units.device)
        units[:, here] = torch.where(better[:, None], rounded[pick], before)
        codebooks[:, group] = torch.where(better, candidates[pick], codebooks[:, group])
        codes[:, place] = torch.where(better[:, None], found[pick], codes[:, place])
        gradient += (units[:, here] - before) @ hessian[here]
    return units, codebooks, codes


def _group_order(width: int, device: torch.device) -> torch.Tensor:
    """Order a group's columns so that those of one code are side by side."""
    return torch.arange(GROUP, device=device).view(width, GROUP // width).T.reshape(-1)
