"""Error feedback inside a group of 32 columns, for all rows of a matrix: the inner loop of gptaq.py and descent.py.

Columns are in the order of quantization, those of one code side by side. With j the columns of one code, w their values
and U_jj that square of U, the code minimizes |(w - q) inv(U_jj)|; with E = (w - q) inv(U_jj) the later columns receive
- E U_j,later, and + w P_j,later where there is a P. Knows nothing else: where U and P come from and how codebooks are
chosen is its callers' business. feedback_cuda.py is the same for kernels.
"""

from dataclasses import dataclass

import torch

from d2q_edge.formats.tensor_types import GROUP


@dataclass(frozen=True)
class Rounded:
    """A group of every row.

    Attributes:
        codes: uint8 [rows, 32 / V].
        quantized: float32 [rows, 32], the chosen entries times the scale.
        errors: E, float32 [rows, 32].
        compensated: w, float32 [rows, 32]: each column's value when its turn came.
    """

    codes: torch.Tensor
    quantized: torch.Tensor
    errors: torch.Tensor
    compensated: torch.Tensor


def diagonal_squares(matrix: torch.Tensor) -> torch.Tensor:
    """The squares of 32 columns on the diagonal of a matrix [n, n]: [n / 32, 32, 32]."""
    groups = len(matrix) // GROUP
    return matrix.reshape(groups, GROUP, groups, GROUP).diagonal(dim1=0, dim2=2).movedim(-1, 0).contiguous()


def corners(factor: torch.Tensor, width: int) -> torch.Tensor:
    """inv(U_jj) of every code: float32 [..., 32 / V, V, V], for U, float32 [..., 32, 32], and V = `width`."""
    # They are upper triangular, so that this takes no solver.
    diagonal = 1 / factor.diagonal(dim1=-2, dim2=-1).unflatten(-1, (-1, width))
    inverses = torch.diag_embed(diagonal)
    if width == 2:
        beside = factor.diagonal(offset=1, dim1=-2, dim2=-1)[..., ::2]
        inverses[..., 0, 1] = -beside * diagonal[..., 0] * diagonal[..., 1]
    return inverses


def round_group(
    targets: torch.Tensor,
    levels: torch.Tensor,
    books: torch.Tensor,
    scales: torch.Tensor,
    factor: torch.Tensor,
    inverses: torch.Tensor,
    lead: torch.Tensor | None = None,
) -> Rounded:
    """Quantize one group of every row.

    Args:
        targets: w, float32 [rows, 32].
        levels: the table, float32 [codebooks, K, V].
        books: int64 [rows], the codebook of each row.
        scales: float32 [rows], what its entries are multiplied by.
        factor: U of these columns, float32 [32, 32].
        inverses: from `corners`.
        lead: P of these columns, float32 [32, 32].
    """
    width = levels.shape[2]
    work = targets.clone()
    quantized, errors = torch.empty_like(work), torch.empty_like(work)
    codes = []
    for index, inverse in enumerate(inverses):
        first, last = index * width, (index + 1) * width
        wanted = work[:, first:last]
        # E of every entry, [rows, V, K]: the product with inv(U_jj) is taken in the table, once for all rows.
        products = (levels @ inverse).transpose(1, 2).contiguous()[books]
        losses = torch.addcmul((wanted @ inverse)[:, :, None], products, scales[:, None, None], value=-1)
        code = losses.square().sum(1).argmin(1)
        loss = losses.gather(2, code[:, None, None].expand(-1, width, 1))[:, :, 0]
        quantized[:, first:last] = levels[books, code] * scales[:, None]
        errors[:, first:last] = loss
        work[:, last:] -= loss @ factor[first:last, last:]
        if lead is not None:
            work[:, last:] += wanted @ lead[first:last, last:]
        codes.append(code.byte())
    return Rounded(torch.stack(codes, 1), quantized, errors, work)
