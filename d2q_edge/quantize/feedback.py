"""Feed back errors inside a group of 32 columns, for all rows of a matrix: the inner loop of gptaq.py and descent.py.

Columns are in the order of quantization, those of one code side by side. With j the columns of one code, w their values
and U_jj the diagonal block of U, the code minimizes |(w - q) inv(U_jj)|. With E = (w - q) inv(U_jj), the later columns
receive -E U_j,later, and +w P_j,later where there is a P. triton/feedback.py does the same inside a kernel.

Where an entry also depends on the code before (trellis.py), the best code of a column is known only after later ones:
the cheapest path into each state survives, with weights that are compensated by its own errors (per-survivor
processing), and the loss of a path is the sum of its |E|^2.
"""

import torch

from d2q_edge.formats.codebooks import CHAIN, SCALAR_STATES
from d2q_edge.formats.tensor_types import GROUP, table_index
from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.trellis import cheapest_ways, first_cost, source


def diagonal_blocks(matrix: torch.Tensor) -> torch.Tensor:
    """Return the 32 x 32 diagonal blocks of a matrix [n, n]: [n / 32, 32, 32]."""
    groups = len(matrix) // GROUP
    return matrix.reshape(groups, GROUP, groups, GROUP).diagonal(dim1=0, dim2=2).movedim(-1, 0).contiguous()


def invert_code_blocks(U: torch.Tensor, width: int) -> torch.Tensor:
    """Return inv(U_jj) of every code of `width` columns V, [..., 32 / V, V, V], of upper triangular U [..., 32, 32]."""
    diagonal = 1 / U.diagonal(dim1=-2, dim2=-1).unflatten(-1, (-1, width))
    inverses = torch.diag_embed(diagonal)
    if width == 2:
        beside = U.diagonal(offset=1, dim1=-2, dim2=-1)[..., ::2]
        inverses[..., 0, 1] = -beside * diagonal[..., 0] * diagonal[..., 1]
    return inverses


def quantize_group(
    weights: torch.Tensor,
    search: CodebookSearch,
    codebooks: torch.Tensor,
    scales: torch.Tensor,
    U: torch.Tensor,
    inv_U_jj: torch.Tensor,
    P: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize one group of every row with error feedback.

    Args:
        weights: w, float32 [rows, 32].
        search: the codebooks.
        codebooks: of each row, int64 [rows].
        scales: what the entries are multiplied by, float32 [rows].
        U, P: those of these columns, float32 [32, 32].
        inv_U_jj: of each code, from `invert_code_blocks`.

    Returns:
        Codes, uint8 [rows, 32 / V]; and, float32 [rows, 32], the chosen entries times the scale, the errors E, and the
        weights w as they were quantized.
    """
    if search.tensor_type.windowed:
        return _quantize_chains(weights, search, codebooks, scales, U, inv_U_jj[:, 0, 0], P)
    levels, width = search.levels, search.levels.shape[2]
    work = weights.clone()
    quantized, errors = torch.empty_like(work), torch.empty_like(work)
    codes = []
    for index, inverse in enumerate(inv_U_jj):
        first, last = index * width, (index + 1) * width
        w = work[:, first:last]
        # E of every entry, [rows, V, K]; the product of entries and inv(U_jj) is the same for all rows.
        products = (levels @ inverse).transpose(1, 2).contiguous()[codebooks]
        losses = torch.addcmul((w @ inverse)[:, :, None], products, scales[:, None, None], value=-1)
        code = losses.square().sum(1).argmin(1)
        error = losses.gather(2, code[:, None, None].expand(-1, width, 1))[:, :, 0]
        quantized[:, first:last] = levels[codebooks, code] * scales[:, None]
        errors[:, first:last] = error
        work[:, last:] -= error @ U[first:last, last:]
        if P is not None:
            work[:, last:] += w @ P[first:last, last:]
        codes.append(code.byte())
    return torch.stack(codes, 1), quantized, errors, work


def _quantize_chains(
    weights: torch.Tensor,
    search: CodebookSearch,
    codebooks: torch.Tensor,
    scales: torch.Tensor,
    U: torch.Tensor,
    inverse: torch.Tensor,
    P: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize one group of every row as `quantize_group`, chain by chain; `inverse` is 1 / diag(U), float32 [32]."""
    work = weights.clone()
    quantized, errors = torch.empty_like(work), torch.empty_like(work)
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    ways, levels = search.ways[codebooks] * scales[:, None, None], search.levels[codebooks, :, 0] * scales[:, None]
    for first in range(0, GROUP, CHAIN):
        here, later = slice(first, first + CHAIN), slice(first + CHAIN, None)
        own_P = None if P is None else P[here, here]
        codes[:, here], work[:, here] = _best_path(work[:, here], ways, U[here, here], inverse[here], own_P)
        quantized[:, here] = levels.gather(1, table_index(codes[:, here]).long())
        errors[:, here] = (work[:, here] - quantized[:, here]) * inverse[here]
        work[:, later] -= errors[:, here] @ U[here, later]
        if P is not None:
            work[:, later] += work[:, here] @ P[here, later]
    return codes, quantized, errors, work


def _best_path(
    weights: torch.Tensor, ways: torch.Tensor, U: torch.Tensor, inverse: torch.Tensor, P: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the path with the least sum of |E|^2 among the survivors of one chain.

    Args:
        weights: w, float32 [rows, 16].
        ways: entries of each row's codebook by next state, times the scale, float32 [rows, 2, K].
        U, P, inverse: those of these columns, float32 [16, 16], and 1 / diag(U), [16].

    Returns:
        Codes, uint8 [rows, 16], and the weights w as they were quantized, float32 [rows, 16].
    """
    rows, per_state = len(weights), ways.shape[2] // SCALAR_STATES
    split = ways.unflatten(2, (SCALAR_STATES, per_state))
    cost = first_cost(weights.shape[:1], weights.device)
    work = weights[:, None].repeat(1, SCALAR_STATES, 1)  # of each survivor
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    states = torch.arange(SCALAR_STATES, device=work.device)
    for column in range(CHAIN):
        lost = (work[:, None, :, None, column] - split) * inverse[column]
        cost, way = cheapest_ways(lost.square().flatten(2), cost)
        before, code = source(way, states, ways.shape[2])
        survivors = before[:, :, None].expand(work.shape)
        work, codes = work.gather(1, survivors), codes.gather(1, survivors)
        codes[:, :, column] = code.byte()
        w = work[:, :, column]
        error = lost.flatten(2).gather(2, way[:, :, None])
        work[:, :, column + 1 :] -= error * U[column, column + 1 :]
        if P is not None:
            work[:, :, column + 1 :] += w[:, :, None] * P[column, column + 1 :]
    best, every = cost.argmin(1), torch.arange(rows, device=work.device)
    return codes[every, best], work[every, best]
