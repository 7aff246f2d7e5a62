"""GPTAQ: error feedback that also corrects for the error of the layer's input (arXiv 2504.02692), over codebooks.

Knows one linear layer: its weights, the statistics of its calibration input, and the codebooks of its tensor type.
Does not know where the inputs come from (pipeline.py) or how blocks are stored (tensor_types.py).

With X the layer's input in the quantized model and X~ the one in the original model, tokens in rows:
    H = 2/n X^T X,   D = 2/n (X~ - X)^T X,
    U = chol(inv(H + damp * mean(diag H) * I)), upper,   P = alpha * ((D U^T) strictly upper) U.
Columns are quantized from left to right. With j the columns of one code (a pair or a single one) and U_jj that square
of U, the code minimizes |(w - q) inv(U_jj)|, and with E = (w - q) inv(U_jj) all later columns receive
- E U_j,later + w P_j,later. alpha 0 is GPTQ (arXiv 2210.17323). Blocks are visited in descending order of their largest
diag(H), which helps like GPTQ's activation order but leaves the storage order alone (DESIGN section 3).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from d2q_edge.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from d2q_edge.formats.tensor_types import GROUP, TensorType
from d2q_edge.quantize.cholesky import inverse_factor, times_upper, times_upper_transposed, upper_times_upper
from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.feedback import corners, diagonal_squares, round_group
from d2q_edge.quantize.lazy_update import LazyUpdate, spans
from d2q_edge.quantize.matmul import product
from d2q_edge.quantize.quantized_layer import QuantizedLayer
from d2q_edge.quantize.triton.support import has_triton

ALPHA = 0.5
"""Weight of the input's error; 0.5 gave the least KL divergence on qwen3-34m (DESIGN section 3)."""
DAMPING = 0.01
"""Share of the mean of diag(H) that is added to it, as in GPTQ."""


class InputStatistics:
    """H and D of one layer input, summed over batches of calibration tokens."""

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.tokens = torch.zeros((), device=device)
        self._gram = torch.zeros(columns, columns, device=device)
        self._drift = torch.zeros(columns, columns, device=device)

    def add_batch(self, quantized: torch.Tensor, original: torch.Tensor) -> None:
        """Add the inputs of the same tokens in both models, float32 [..., columns]."""
        x = quantized.reshape(-1, quantized.shape[-1])
        self.tokens += len(x)
        self._gram += x.T @ x
        self._drift += (original.reshape(x.shape) - x).T @ x

    @property
    def sums(self) -> list[torch.Tensor]:
        """What was summed, to be added up with the sums of other processes."""
        return [self._gram, self._drift, self.tokens]

    @property
    def hessian(self) -> torch.Tensor:
        """H, float32 [columns, columns]."""
        return self._gram * (2 / self.tokens.clamp(min=1))

    @property
    def drift(self) -> torch.Tensor:
        """D, float32 [columns, columns]."""
        return self._drift * (2 / self.tokens.clamp(min=1))


@dataclass(frozen=True)
class Feedback:
    """What the error feedback needs of a layer input's statistics, columns in the order of quantization.

    Attributes:
        order: int64 [columns], the columns in that order.
        dead: bool [columns], in storage order: columns whose input is always zero.
        damping: what was added to diag(H), float32 [].
        factor: U, float32 [columns, columns].
        spread: D U^T, float32 [columns, columns]; None where alpha is zero.
        lead: P, float32 [columns, columns]; None where alpha is zero.
        alpha: weight of the input's error.
    """

    order: torch.Tensor
    dead: torch.Tensor
    damping: torch.Tensor
    factor: torch.Tensor
    spread: torch.Tensor | None
    lead: torch.Tensor | None
    alpha: float

    @classmethod
    def of(
        cls,
        statistics: InputStatistics,
        order_of: Callable[[torch.Tensor], torch.Tensor],
        alpha: float,
        damping: float = DAMPING,
        processes: ProcessGroup = SINGLE_PROCESS,
    ) -> "Feedback":
        """Compute U and P.

        Args:
            statistics: of the layer's input.
            order_of: the order of the columns, given diag(H).
            alpha: weight of the input's error; 0 is plain GPTQ.
            damping: share of the mean of diag(H) that is added to the diagonal.
            processes: the processes that share the work; all of them call this with the same statistics.

        Raises:
            D2QError: the Hessian can't be factored even in double precision with strong damping.
        """
        hessian = statistics.hessian
        dead = hessian.diagonal() == 0
        order = order_of(hessian.diagonal())
        factor, added = inverse_factor(hessian[order[:, None], order], damping, processes)
        del hessian
        spread = lead = None
        if alpha:
            spread = times_upper_transposed(statistics.drift[order[:, None], order], factor, processes)
            lead = alpha * upper_times_upper(spread.triu(1), factor, processes)
        return cls(order, dead, added, factor, spread, lead, alpha)

    def arrange(self, weights: torch.Tensor) -> torch.Tensor:
        """A copy of the weights [rows, columns] in this order, dead columns zero."""
        return weights.masked_fill(self.dead, 0)[:, self.order]

    def target(self, weights: torch.Tensor) -> torch.Tensor:
        """W + alpha W D inv(H): what the quantized layer should be if rounding cost nothing [rows, columns]."""
        target = weights.masked_fill(self.dead, 0)
        if self.spread is not None:
            # inv(H) is U^T U.
            target[:, self.order] += self.alpha * times_upper(product(target[:, self.order], self.spread), self.factor)
        return target


def layer_feedback(
    statistics: InputStatistics,
    kind: TensorType,
    alpha: float = ALPHA,
    damping: float = DAMPING,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> Feedback:
    """The Feedback for blocks of one tensor type; arguments and errors are those of Feedback.of."""
    return Feedback.of(statistics, lambda diagonal: _processing_order(diagonal, kind), alpha, damping, processes)


def quantize_layer(weights: torch.Tensor, feedback: Feedback, search: CodebookSearch) -> QuantizedLayer:
    """Quantize one matrix with error feedback.

    Args:
        weights: float32 [rows, cols]; the block size of the search's tensor type divides cols.
        feedback: from `layer_feedback`, for this type.
        search: the codebooks.
    """
    kind = search.tensor_type
    rows, columns = weights.shape
    order, factor, lead = feedback.order, feedback.factor, feedback.lead
    work = feedback.arrange(weights)

    result = QuantizedLayer(
        torch.empty(rows, columns // kind.block_size, dtype=torch.float16, device=weights.device),
        torch.empty(rows, columns // GROUP, dtype=torch.uint8, device=weights.device),
        torch.empty(rows, kind.codes(columns), dtype=torch.uint8, device=weights.device),
        torch.empty_like(weights),
    )
    inverses = corners(diagonal_squares(factor), search.levels.shape[2])
    # All of them at once: asking a GPU for one would wait for it.
    places = (order.view(-1, kind.block_size).amin(1) // kind.block_size).tolist()
    influences = [factor] if lead is None else [factor, lead]
    for begin, end in spans(columns, kind.block_size, work.device):
        update = LazyUpdate(work[:, begin:end], work[:, end:], [each[begin:end, begin:] for each in influences])
        for start in range(begin, end, kind.block_size):
            number = start // kind.block_size
            index, here = places[number], slice(start, start + kind.block_size)
            groups = slice(number * kind.groups, (number + 1) * kind.groups)
            inner = None if lead is None else lead[here, here]
            block = _Block(*quantize_block(search, work[:, here], factor[here, here], inner, inverses[groups]))
            update.add(*(-block.errors, block.compensated)[: len(influences)])
            result.scales[:, index] = block.scales.half()
            result.codebooks[:, index * kind.groups : (index + 1) * kind.groups] = block.codebooks
            result.codes[:, index * block.codes.shape[1] : (index + 1) * block.codes.shape[1]] = block.codes
            result.weights[:, order[here]] = block.quantized
        update.finish()
    return result


@dataclass
class _Block:
    """One block of all rows, columns in processing order."""

    scales: torch.Tensor
    codebooks: torch.Tensor
    codes: torch.Tensor
    quantized: torch.Tensor
    errors: torch.Tensor
    compensated: torch.Tensor


def quantize_block(
    search: CodebookSearch,
    weights: torch.Tensor,
    factor: torch.Tensor,
    lead: torch.Tensor | None,
    inverses: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Quantize one block of every row, feeding errors back inside the block. On a GPU it is one kernel (gptaq.py).

    Args:
        search: the codebooks.
        weights: float32 [rows, block_size], in processing order.
        factor, lead: U and P of these columns, float32 [block_size, block_size].
        inverses: of each group from `feedback.corners`.

    Returns:
        Scales d [rows], codebooks [rows, groups], codes [rows, codes], and, float32 [rows, block_size], the quantized
        weights, the errors, and the weights when their turn came.
    """
    if has_triton(weights.device):
        from d2q_edge.quantize.triton import gptaq

        return gptaq.quantize_block(search, weights, factor, lead, inverses)
    kind = search.tensor_type
    work = weights.clone()
    scales = search.block_scales(_storage_order(work, kind))
    codebooks, codes = [], []
    quantized, errors = torch.empty_like(work), torch.empty_like(work)
    for number, start in enumerate(range(0, kind.block_size, GROUP)):
        stop = start + GROUP
        here = slice(start, stop)
        vectors = search.vectors(_storage_order(work[:, here], kind)) / scales[:, None, None]
        book, _ = search.search(vectors)
        inner = None if lead is None else lead[here, here]
        group = round_group(work[:, here], search.levels, book, scales, factor[here, here], inverses[number], inner)
        quantized[:, here], errors[:, here], work[:, here] = group.quantized, group.errors, group.compensated
        # The rest of the block follows when the group is done.
        work[:, stop:] -= group.errors @ factor[here, stop:]
        if lead is not None:
            work[:, stop:] += group.compensated @ lead[here, stop:]
        codebooks.append(book)
        codes.append(group.codes)
    return scales, torch.stack(codebooks, 1).byte(), torch.cat(codes, 1), quantized, errors, work


def _storage_order(weights: torch.Tensor, kind: TensorType) -> torch.Tensor:
    """Undo _processing_order inside groups: pairs adjacent -> pairs 16 apart."""
    if not kind.paired:
        return weights
    return weights.reshape(len(weights), -1, GROUP // 2, 2).transpose(2, 3).reshape(weights.shape)


def _processing_order(diagonal: torch.Tensor, kind: TensorType) -> torch.Tensor:
    """Columns in the order of quantization: int64 [cols]. Blocks by importance; inside, pairs side by side."""
    columns = torch.arange(len(diagonal), device=diagonal.device)
    if kind.paired:
        columns = columns.view(-1, 2, GROUP // 2).transpose(1, 2).reshape(-1)
    importance = diagonal.view(-1, kind.block_size).amax(1)
    blocks = importance.argsort(descending=True, stable=True)
    return columns.view(-1, kind.block_size)[blocks].reshape(-1)
