"""Feed back errors inside a group of 32 columns, for all rows of a matrix: the inner loop of gptaq.py and descent.py.

Columns are in the order of quantization, those of one code side by side. With j the columns of one code, w their values
and U_jj the diagonal block of U, the code minimizes |(w - q) inv(U_jj)|. With E = (w - q) inv(U_jj), the later columns
receive -E U_j,later, and +w P_j,later where there is a P. triton/feedback.py does the same inside a kernel.
"""

import torch

from d2q_edge.formats.tensor_types import GROUP


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
    levels: torch.Tensor,
    codebooks: torch.Tensor,
    scales: torch.Tensor,
    U: torch.Tensor,
    inv_U_jj: torch.Tensor,
    P: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize one group of every row with error feedback.

    Args:
        weights: w, float32 [rows, 32].
        levels: entries of all codebooks, float32 [codebooks, K, V].
        codebooks: of each row, int64 [rows].
        scales: what the entries are multiplied by, float32 [rows].
        U, P: those of these columns, float32 [32, 32].
        inv_U_jj: of each code, from `invert_code_blocks`.

    Returns:
        Codes, uint8 [rows, 32 / V]; and, float32 [rows, 32], the chosen entries times the scale, the errors E, and the
        weights w as they were quantized.
    """
    width = levels.shape[2]
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
