"""Quantize one block of columns with error feedback in C (gptaq.c)."""

import torch

from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.native.threads import run


def quantize_block(
    search: CodebookSearch, weights: torch.Tensor, U: torch.Tensor, P: torch.Tensor | None, inv_U_jj: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Quantize one block of every row, as gptaq.quantize_block."""
    kind, (rows, size) = search.tensor_type, weights.shape
    work = weights.clone(memory_format=torch.contiguous_format)
    scales = torch.empty(rows)
    codebooks = torch.empty(rows, kind.groups, dtype=torch.uint8)
    codes = torch.empty(rows, kind.codes(size), dtype=torch.uint8)
    quantized, errors = torch.empty_like(work), torch.empty_like(work)
    factors = U.contiguous(), None if P is None else P.contiguous(), inv_U_jj.contiguous()
    run("quantize_block", search.native_tables, rows, work, *factors, scales, codebooks, codes, quantized, errors)
    return scales, codebooks, codes, quantized, errors, work
