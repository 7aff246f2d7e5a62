"""Quantize one block of columns with error feedback (gptaq.quantize_block) in one Triton kernel.

A program takes a few rows, which are independent, and one group after another.
"""

import torch
import triton
import triton.language as tl

from d2q_edge.formats.tensor_types import GROUP
from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.triton.codebook_search import best_codebook, block_scales, rank_table, search_constants
from d2q_edge.quantize.triton.feedback import quantize_rows, rows_per_program


@triton.jit  # type: ignore[untyped-decorator]
def _quantize_block(  # type: ignore[no-untyped-def]
    work, scales, table, levels, U, P, inv_U_jj, codebooks, codes, quantized, errors, rows,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, HAS_P: tl.constexpr, ROWS: tl.constexpr,
    N: tl.constexpr, V: tl.constexpr, K: tl.constexpr, BINS: tl.constexpr, KNEE: tl.constexpr, EDGE: tl.constexpr,
    SHORTLIST: tl.constexpr, CODEBOOKS: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = GROUPS * GROUP
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    alive = live[:, None]
    column = tl.arange(0, GROUP)
    inside = column[:, None] * SIZE + column[None, :]
    scale = tl.load(scales + row, mask=live, other=1.0)
    for group in range(GROUPS):
        first = group * GROUP
        start = row * SIZE + first
        codebook, _ = best_codebook(
            work + start, scale, live, table, levels,
            N, V, K, BINS, KNEE, EDGE, SHORTLIST, CODEBOOKS, WINDOWED, ROWS,
        )  # fmt: skip
        tl.store(codebooks + row * GROUPS + group, codebook.to(tl.uint8), mask=live)
        place = start[:, None] + column[None, :]
        square = first * SIZE + first
        code, found, lost, seen = quantize_rows(
            tl.load(work + place, mask=alive, other=0.0), codebook, scale, levels,
            U + square, P + square, SIZE, inv_U_jj + group * (N * V * V),
            GROUP, K, V, HAS_P, WINDOWED, ROWS,
        )  # fmt: skip
        beside = (row * GROUPS + group)[:, None] * N + column[None, :] // V
        tl.store(codes + beside, code.to(tl.uint8), mask=alive & (column[None, :] % V == 0))
        tl.store(quantized + place, found, mask=alive)
        tl.store(errors + place, lost, mask=alive)
        tl.store(work + place, seen, mask=alive)
        for later in range(group + 1, GROUPS):
            ahead = (later - group) * GROUP
            tile = tl.load(work + place + ahead, mask=alive, other=0.0)
            tile -= tl.dot(lost, tl.load(U + square + ahead + inside), input_precision="ieee")
            if HAS_P:
                tile += tl.dot(seen, tl.load(P + square + ahead + inside), input_precision="ieee")
            tl.store(work + place + ahead, tile, mask=alive)
        # Other threads of this program have written what the next group reads.
        tl.debug_barrier()


def quantize_block(
    search: CodebookSearch, weights: torch.Tensor, U: torch.Tensor, P: torch.Tensor | None, inv_U_jj: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Quantize one block of every row, as gptaq.quantize_block."""
    kind, (rows, size) = search.tensor_type, weights.shape
    work = weights.clone(memory_format=torch.contiguous_format)
    # Pairs are side by side here, which CodebookSearch.block_scales doesn't expect.
    scales = block_scales(search, work) if kind.paired else search.block_scales(work)
    codebooks = torch.empty(rows, kind.groups, dtype=torch.uint8, device=work.device)
    codes = torch.empty(rows, kind.codes(size), dtype=torch.uint8, device=work.device)
    quantized, errors = torch.empty_like(work), torch.empty_like(work)
    U, together = U.contiguous(), rows_per_program(rows, work.device)
    _quantize_block[(triton.cdiv(rows, together),)](
        work, scales, rank_table(search), search.columns, U, U if P is None else P.contiguous(),
        inv_U_jj.contiguous(), codebooks, codes, quantized, errors, rows,
        GROUPS=kind.groups, GROUP=GROUP, HAS_P=P is not None, ROWS=together, num_stages=1, **search_constants(search),
    )  # fmt: skip
    return scales, codebooks, codes, quantized, errors, work
