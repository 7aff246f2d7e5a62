"""Coordinate descent on a quantized layer: scales, codebooks and codes, all towards the layer's output.

Error feedback (gptaq.py) decides every weight once, from left to right. Afterwards all of them are known, and each part
of the layer can be chosen again, given the rest. With H and D as in gptaq.py, what GPTAQ approximates is

    minimize tr((Q - T) H (Q - T)^T),   T = W + alpha W D inv(H),

H damped. Two moves, repeated ROUNDS times:
- the block scales of a row, all at once: with Q = sum_b d_b u_b this is least squares in the d_b, one system per row;
- a group of 32 weights, given all others: its optimum without rounding is t = q - g inv(H_gg), g the group's part of
  (Q - T) H. Codes are found by error feedback inside the group, for the present codebook and for the one nearest to t,
  and kept where the objective really falls.
The first is as in other scale refits of GPTQ-like methods, the second is block coordinate descent as in CDQuant
(arXiv 2406.17542), over codebooks. Neither can raise the objective beyond the rounding of a scale to float16.
"""

import torch

from d2q_edge.formats.tensor_types import GROUP
from d2q_edge.quantize.codebook_search import CodebookSearch, stored_scale
from d2q_edge.quantize.feedback import corners, diagonal_squares, round_group
from d2q_edge.quantize.gptaq import Feedback, InputStatistics
from d2q_edge.quantize.lazy_update import LazyUpdate, spans
from d2q_edge.quantize.matmul import product, whole_product
from d2q_edge.quantize.quantized_layer import QuantizedLayer
from d2q_edge.quantize.triton.support import has_triton

ROUNDS = 2
"""A third round gains less than a tenth of what the first two do."""


def descend(
    layer: QuantizedLayer,
    weights: torch.Tensor,
    statistics: InputStatistics,
    feedback: Feedback,
    search: CodebookSearch,
    rounds: int = ROUNDS,
) -> QuantizedLayer:
    """Improve a quantized matrix.

    Args:
        layer: from quantize_layer.
        weights: float32 [rows, cols], the original ones.
        statistics: of the layer's input.
        feedback, search: as given to quantize_layer.
        rounds: how often both moves are made; the scales are fitted once more at the end.
    """
    if not rounds:
        return layer
    problem = _Problem(layer, weights, statistics, feedback, search)
    for _ in range(rounds):
        problem.fit_scales()
        problem.choose_groups()
    problem.fit_scales()
    return problem.layer()


class _Problem:
    """One layer: H, T, and the present blocks; `units` are the table's entries, Q = units * scales."""

    def __init__(
        self,
        layer: QuantizedLayer,
        weights: torch.Tensor,
        statistics: InputStatistics,
        feedback: Feedback,
        search: CodebookSearch,
    ) -> None:
        self.search, self.kind = search, search.tensor_type
        self.hessian = statistics.hessian
        self.hessian.diagonal().add_(feedback.damping)
        self.target = feedback.target(weights)
        self.wanted = product(self.target, self.hessian)
        self._factor_groups()
        self.scales = layer.scales.float()
        self.books = layer.codebooks.long()
        self.codes = layer.codes.clone()
        self.units = self._units(layer.weights)

    def layer(self) -> QuantizedLayer:
        return QuantizedLayer(self.scales.half(), self.books.byte(), self.codes, self._quantized())

    def fit_scales(self) -> None:
        """All block scales of every row by least squares; a scale whose solution makes no sense stays as it is.

        That of a block which is as good as empty doesn't: its weights, or their inputs, are all zero.
        """
        rows, columns = self.units.shape
        size = self.kind.block_size
        blocks = columns // size
        matrix = torch.empty(rows, blocks, blocks, device=self.units.device)
        for block in range(blocks):
            # The other half of the matrix is the same.
            here, later = slice(block * size, (block + 1) * size), slice(block * size, None)
            seen = whole_product(self.units[:, here], self.hessian[here, later])
            matrix[:, block, block:] = (seen * self.units[:, later]).view(rows, blocks - block, size).sum(2)
            matrix[:, block:, block] = matrix[:, block, block:]
        wanted = (self.wanted * self.units).view(rows, blocks, size).sum(2)
        # The equation of a block of zeros must not be singular.
        matrix.diagonal(dim1=1, dim2=2).mul_(1 + 1e-6).add_(1e-12)
        solution = torch.linalg.solve_ex(matrix, wanted[:, :, None]).result[:, :, 0]
        sane = self._sane(solution)
        if not bool(sane.all()):
            # Once more for the others, given those that stay.
            staying = torch.where(sane, 0.0, self.scales)
            wanted = torch.where(sane, wanted - (matrix @ staying[:, :, None])[:, :, 0], self.scales)
            identity = torch.eye(blocks, device=matrix.device)
            matrix = torch.where(sane[:, :, None] & sane[:, None], matrix, identity)
            solution = torch.linalg.solve_ex(matrix, wanted[:, :, None]).result[:, :, 0]
        sane = self._sane(solution).all(1, keepdim=True)
        self.scales = torch.where(sane, stored_scale(solution), self.scales)

    def _sane(self, solution: torch.Tensor) -> torch.Tensor:
        return (solution > self.scales / 2) & (solution < self.scales * 2)

    def choose_groups(self) -> None:
        """Choose codebook and codes of one group after another, in storage order."""
        size, groups = self.kind.block_size, self.kind.groups
        width = self.codes.shape[1] // self.scales.shape[1]
        gradient = product(self._quantized() - self.target, self.hessian)
        for begin, end in spans(self.units.shape[1], size, gradient.device):
            update = LazyUpdate(gradient[:, begin:end], gradient[:, end:], [self.hessian[begin:end, begin:]])
            for block in range(begin // size, end // size):
                here, books = slice(block * size, (block + 1) * size), slice(block * groups, (block + 1) * groups)
                codes = slice(block * width, (block + 1) * width)
                scale = self.scales[:, block, None]
                before = self.units[:, here].clone()
                self.units[:, here], self.books[:, books], self.codes[:, codes] = choose_block(
                    self.search,
                    gradient[:, here] / scale,
                    before,
                    self.books[:, books],
                    self.codes[:, codes],
                    self.hessian[here, here],
                    self.inverses[books],
                    self.factors[books],
                    self.corners[books],
                )
                update.add((self.units[:, here] - before) * scale)
            update.finish()

    def _factor_groups(self) -> None:
        """Invert the Hessian's square of every group, and prepare the error feedback inside it."""
        width = self.search.levels.shape[2]
        order = _order(width, self.hessian.device)
        squares = diagonal_squares(self.hessian)
        # The variants without a check: damped, it can't fail, and a check would wait for the GPU.
        self.inverses = torch.cholesky_inverse(torch.linalg.cholesky_ex(squares).L)
        self.factors = torch.linalg.cholesky_ex(self.inverses[:, order][:, :, order], upper=True).L
        self.corners = corners(self.factors, width)

    def _quantized(self) -> torch.Tensor:
        return self.units * self.scales.repeat_interleave(self.kind.block_size, 1)

    def _units(self, quantized: torch.Tensor) -> torch.Tensor:
        # Entries are whole numbers; the division may miss them by a rounding error.
        return (quantized / self.scales.repeat_interleave(self.kind.block_size, 1)).round()


def choose_block(
    search: CodebookSearch,
    gradient: torch.Tensor,
    units: torch.Tensor,
    books: torch.Tensor,
    codes: torch.Tensor,
    hessian: torch.Tensor,
    inverses: torch.Tensor,
    factors: torch.Tensor,
    inner: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose the groups of one block of all rows. On a GPU it is one kernel (descent.py).

    Args:
        search: the codebooks.
        gradient: (Q - T) H in units of d, float32 [rows, block_size].
        units, books, codes: of the block as it is.
        hessian: H of the block's columns.
        inverses: inv(H_gg) of its groups, [groups, 32, 32].
        factors, inner: U of each group, and its `feedback.corners`.

    Returns:
        New units, books and codes.
    """
    if has_triton(units.device):
        from d2q_edge.quantize.triton import descent

        return descent.choose_block(search, gradient, units, books, codes, hessian, inverses, factors, inner)
    width = codes.shape[1] // books.shape[1]
    gradient, units, books, codes = gradient.clone(), units.clone(), books.clone(), codes.clone()
    for group in range(books.shape[1]):
        here, place = slice(group * GROUP, (group + 1) * GROUP), slice(group * width, (group + 1) * width)
        before = units[:, here].clone()
        units[:, here], books[:, group], codes[:, place] = _choose_group(
            search,
            gradient[:, here],
            before,
            books[:, group],
            codes[:, place],
            hessian[here, here],
            inverses[group],
            factors[group],
            inner[group],
        )
        gradient += (units[:, here] - before) @ hessian[here]
    return units, books, codes


def _choose_group(
    search: CodebookSearch,
    gradient: torch.Tensor,
    present: torch.Tensor,
    books: torch.Tensor,
    codes: torch.Tensor,
    hessian: torch.Tensor,
    inverse: torch.Tensor,
    factor: torch.Tensor,
    inner: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same for one group: its part of everything in `choose_block`."""
    order = _order(search.levels.shape[2], present.device)
    target = present - gradient @ inverse
    error = ((present - target) @ hessian * (present - target)).sum(1)
    nearest, _ = search.search(search.vectors(target))
    # Both candidates in one go, below each other.
    candidates, wanted = torch.cat([books, nearest]), target.repeat(2, 1)
    found = round_group(wanted[:, order], search.levels, candidates, torch.ones_like(wanted[:, 0]), factor, inner)
    rounded = torch.empty_like(wanted)
    rounded[:, order] = found.quantized
    off = rounded - wanted
    least, which = ((off @ hessian) * off).sum(1).view(2, -1).min(0)
    better = least < error
    pick = which * len(target) + torch.arange(len(target), device=target.device)
    return (
        torch.where(better[:, None], rounded[pick], present),
        torch.where(better, candidates[pick], books),
        torch.where(better[:, None], found.codes[pick], codes),
    )


def _order(width: int, device: torch.device) -> torch.Tensor:
    """A group's columns with those of one code side by side."""
    return torch.arange(GROUP, device=device).view(width, GROUP // width).T.reshape(-1)
