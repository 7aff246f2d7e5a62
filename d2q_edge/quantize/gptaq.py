"""Quantize a matrix with GPTAQ (arXiv 2504.02692): error feedback that also corrects the error of the layer's input.

With H and dXXT from statistics.py:

    U = chol(inv(H + damping * mean(diag H) * I)), upper,    P = alpha * ((dXXT U^T) strictly upper) U.

Columns are quantized from left to right. With j the columns of one code (a pair or a single one), the code minimizes
|(w - q) inv(U_jj)|; with E = (w - q) inv(U_jj), all later columns receive -E U_j,later + w P_j,later. alpha 0 is GPTQ
(arXiv 2210.17323). Blocks are visited in descending order of their largest diag(H): as good as GPTQ's activation order,
but the storage order stays.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from d2q_edge.formats.tensor_types import GROUP, TensorType
from d2q_edge.quantize import native, triton
from d2q_edge.quantize.cholesky import inverse_cholesky, times_upper, times_upper_transposed, upper_times_upper
from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.collective import SINGLE_PROCESS, Collective
from d2q_edge.quantize.feedback import diagonal_blocks, invert_code_blocks, quantize_group
from d2q_edge.quantize.lazy_update import LazyUpdate, spans
from d2q_edge.quantize.matmul import product
from d2q_edge.quantize.quantized_layer import QuantizedLayer
from d2q_edge.quantize.statistics import InputStatistics

DAMPING = 0.01
"""Share of the mean of diag(H) that is added to the diagonal, as in GPTQ."""


@dataclass(frozen=True)
class Feedback:
    """What error feedback needs of a layer input's statistics, columns in the order of quantization.

    Attributes:
        order: int64 [columns], the columns in that order.
        dead: bool [columns], in storage order: columns whose input is always zero.
        damping: what was added to diag(H), float32 [].
        U, P, dXXT_UT: U, P, and dXXT U^T, float32 [columns, columns]; the latter two are None where alpha is zero.
        alpha: weight of the input's error.
    """

    order: torch.Tensor
    dead: torch.Tensor
    damping: torch.Tensor
    U: torch.Tensor
    P: torch.Tensor | None
    dXXT_UT: torch.Tensor | None
    alpha: float

    @classmethod
    def compute(
        cls,
        statistics: InputStatistics,
        order_of: Callable[[torch.Tensor], torch.Tensor],
        alpha: float,
        damping: float,
        processes: Collective = SINGLE_PROCESS,
    ) -> "Feedback":
        """Compute U and P.

        Args:
            statistics: of the layer's input.
            order_of: returns the order of the columns, given diag(H).
            alpha: weight of the input's error; 0 is GPTQ.
            damping: share of the mean of diag(H) that is added to the diagonal (GPTQ's percdamp).
            processes: share the work; all of them call this with the same statistics.

        Raises:
            D2QError: the Hessian can't be factored even in float64 with strong damping.
        """
        hessian = statistics.hessian
        dead = hessian.diagonal() == 0
        order = order_of(hessian.diagonal())
        U, added = inverse_cholesky(hessian[order[:, None], order], damping, processes)
        del hessian
        P = dXXT_UT = None
        if alpha:
            dXXT_UT = times_upper_transposed(statistics.dXXT[order[:, None], order], U, processes)
            P = alpha * upper_times_upper(dXXT_UT.triu(1), U, processes)
        return cls(order, dead, added, U, P, dXXT_UT, alpha)

    def permute(self, weights: torch.Tensor) -> torch.Tensor:
        """Return a copy of the weights [rows, columns] in the order of quantization, dead columns zero."""
        return weights.masked_fill(self.dead, 0)[:, self.order]

    def target(self, weights: torch.Tensor) -> torch.Tensor:
        """Return W + alpha W dXXT inv(H), the best unrounded layer for the quantized model's input: [rows, columns]."""
        target = weights.masked_fill(self.dead, 0)
        if self.dXXT_UT is not None:
            # inv(H) is U^T U.
            target[:, self.order] += self.alpha * times_upper(product(target[:, self.order], self.dXXT_UT), self.U)
        return target


def layer_feedback(
    statistics: InputStatistics, kind: TensorType, alpha: float, processes: Collective = SINGLE_PROCESS
) -> Feedback:
    """Compute the Feedback for blocks of one tensor type; arguments and errors are those of Feedback.compute."""
    return Feedback.compute(statistics, lambda diagonal: _column_order(diagonal, kind), alpha, DAMPING, processes)


def quantize_layer(weights: torch.Tensor, feedback: Feedback, search: CodebookSearch) -> QuantizedLayer:
    """Quantize a matrix, float32 [rows, columns], with the error feedback for the search's tensor type."""
    kind, device = search.tensor_type, weights.device
    rows, columns = weights.shape
    size, blocks = kind.block_size, columns // kind.block_size
    order, U, P = feedback.order, feedback.U, feedback.P
    W = feedback.permute(weights)
    scales = torch.empty(rows, blocks, dtype=torch.float16, device=device)
    codebooks = torch.empty(rows, blocks, kind.groups, dtype=torch.uint8, device=device)
    codes = torch.empty(rows, blocks, kind.codes(size), dtype=torch.uint8, device=device)
    Q = torch.empty_like(weights)
    inv_U_jj = invert_code_blocks(diagonal_blocks(U), search.levels.shape[2]).unflatten(0, (blocks, -1))
    # One transfer for all blocks: each would wait for the GPU.
    places = (order.view(-1, size).amin(1) // size).tolist()
    factors = [U] if P is None else [U, P]
    for begin, end in spans(columns, size, device):
        update = LazyUpdate(W[:, begin:end], W[:, end:], [factor[begin:end, begin:] for factor in factors])
        for start in range(begin, end, size):
            here, number = slice(start, start + size), start // size
            place = places[number]
            block_P = None if P is None else P[here, here]
            found = quantize_block(search, W[:, here], U[here, here], block_P, inv_U_jj[number])
            block_scales, codebooks[:, place], codes[:, place], Q[:, order[here]], errors, compensated = found
            scales[:, place] = block_scales.half()
            update.add(*(-errors, compensated)[: len(factors)])
        update.finish()
    return QuantizedLayer(scales, codebooks.flatten(1), codes.flatten(1), Q)


def quantize_block(
    search: CodebookSearch, weights: torch.Tensor, U: torch.Tensor, P: torch.Tensor | None, inv_U_jj: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Quantize one block of every row, with error feedback inside the block, by one compiled kernel where there is one.

    Args:
        search: the codebooks.
        weights: float32 [rows, block_size], in processing order.
        U, P: those of these columns, float32 [block_size, block_size].
        inv_U_jj: of each group, from `invert_code_blocks`, [groups, 32 / V, V, V].

    Returns:
        Scales d, float32 [rows]; codebooks, uint8 [rows, groups]; codes, uint8 [rows, codes]; and, float32
        [rows, block_size], the quantized weights, the errors E, and the weights w as they were quantized.
    """
    if triton.is_available(weights.device):
        return triton.quantize_block(search, weights, U, P, inv_U_jj)
    if native.is_available(search.tensor_type, weights.device):
        return native.quantize_block(search, weights, U, P, inv_U_jj)
    work = weights.clone()
    scales = search.block_scales(storage_order(work, search.tensor_type))
    quantized, errors = torch.empty_like(work), torch.empty_like(work)
    codebooks, codes = [], []
    for number, inv_U in enumerate(inv_U_jj):
        here, stop = slice(number * GROUP, (number + 1) * GROUP), (number + 1) * GROUP
        chosen, _ = search.search(work[:, here].unflatten(1, inv_U.shape[:2]) / scales[:, None, None])
        group_P = None if P is None else P[here, here]
        group_codes, quantized[:, here], E, w = quantize_group(
            work[:, here], search, chosen, scales, U[here, here], inv_U, group_P
        )
        errors[:, here], work[:, here] = E, w
        work[:, stop:] -= E @ U[here, stop:]
        if P is not None:
            work[:, stop:] += w @ P[here, stop:]
        codebooks.append(chosen)
        codes.append(group_codes)
    return scales, torch.stack(codebooks, 1).byte(), torch.cat(codes, 1), quantized, errors, work


def storage_order(weights: torch.Tensor, kind: TensorType) -> torch.Tensor:
    """Move the columns [rows, n * 32] of pairs, adjacent while they are quantized, 16 apart again."""
    if not kind.paired:
        return weights
    return weights.reshape(len(weights), -1, GROUP // 2, 2).transpose(2, 3).reshape(weights.shape)


def _column_order(diagonal: torch.Tensor, kind: TensorType) -> torch.Tensor:
    """Order the columns, int64 [columns]: blocks by importance; inside of them, the columns of a pair side by side."""
    columns = torch.arange(len(diagonal), device=diagonal.device)
    if kind.paired:
        columns = columns.view(-1, 2, GROUP // 2).transpose(1, 2).reshape(-1)
    importance = diagonal.view(-1, kind.block_size).amax(1)
    blocks = importance.argsort(descending=True, stable=True)
    return columns.view(-1, kind.block_size)[blocks].reshape(-1)
