"""Choose the groups of one block of columns again in C (descent.c)."""

import torch

from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.native.threads import run


def choose_block(search: CodebookSearch, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose the groups of one block of all rows again, as descent.choose_block, given its tensors in that order."""
    gradient, units, codebooks, codes, *factors = tensors
    units, codes = (each.clone(memory_format=torch.contiguous_format) for each in (units, codes))
    chosen = codebooks.byte().contiguous()
    factors = [factor.contiguous() for factor in factors]
    run("choose_block", search.native_tables, len(units), gradient.contiguous(), units, chosen, codes, *factors)
    return units, chosen.long(), codes
