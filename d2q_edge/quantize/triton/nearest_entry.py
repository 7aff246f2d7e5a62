"""Find the nearest entries of given codebooks in Triton, as CodebookSearch.nearest does, rows as they are stored."""

import torch
import triton
import triton.language as tl

from d2q_edge.formats.codebooks import CHAIN
from d2q_edge.formats.tensor_types import GROUP, table_index
from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.triton.trellis import best_codes

PAIRS = 512
"""Pairs per program."""


@triton.jit  # type: ignore[untyped-decorator]
def _nearest_pairs(  # type: ignore[no-untyped-def]
    values, levels, codebooks, units, codes, pairs, HALF: tl.constexpr, K: tl.constexpr, PAIRS: tl.constexpr
):
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    live = pair < pairs
    group = pair // HALF
    place = group * (2 * HALF) + pair % HALF
    first = tl.load(values + place, mask=live, other=0.0)
    second = tl.load(values + place + HALF, mask=live, other=0.0)
    table = levels + tl.load(codebooks + group, mask=live, other=0).to(tl.int32) * (2 * K)
    least = tl.full([PAIRS], float("inf"), tl.float32)
    code = tl.zeros([PAIRS], tl.int32)
    unit0 = tl.zeros([PAIRS], tl.float32)
    unit1 = unit0
    for trial in tl.static_range(K):
        entry0 = tl.load(table + 2 * trial, mask=live, other=0.0)
        entry1 = tl.load(table + 2 * trial + 1, mask=live, other=0.0)
        error = (first - entry0) * (first - entry0) + (second - entry1) * (second - entry1)
        better = error < least
        least = tl.where(better, error, least)
        code = tl.where(better, trial, code)
        unit0 = tl.where(better, entry0, unit0)
        unit1 = tl.where(better, entry1, unit1)
    tl.store(units + place, unit0.to(tl.int8), mask=live)
    tl.store(units + place + HALF, unit1.to(tl.int8), mask=live)
    tl.store(codes + pair, code.to(tl.uint8), mask=live)


def nearest_entries(
    search: CodebookSearch, values: torch.Tensor, codebooks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the nearest entries of rows of our types.

    Args:
        search: of the type.
        values: float32 [rows, columns], in units of d.
        codebooks: uint8 [rows, columns / 32].

    Returns:
        The entries, int8 [rows, columns], and the codes, uint8 [rows, codes].
    """
    values = values.contiguous()
    if search.tensor_type.windowed:
        chosen = codebooks.reshape(-1).long()
        codes = best_codes(values.view(-1, GROUP), search.ways, chosen)
        index = table_index(codes).int() + chosen.int()[:, None] * search.levels.shape[1]
        units = search.levels.to(torch.int8).flatten()[index.view(values.shape)]
        return units, codes.view(values.shape)
    units = torch.empty(values.shape, dtype=torch.int8, device=values.device)
    codes = torch.empty(len(values), values.shape[1] // 2, dtype=torch.uint8, device=values.device)
    _nearest_pairs[(triton.cdiv(codes.numel(), PAIRS),)](
        values, search.levels, codebooks.contiguous(), units, codes, codes.numel(),
        HALF=CHAIN, K=search.levels.shape[1], PAIRS=PAIRS,
    )  # fmt: skip
    return units, codes
