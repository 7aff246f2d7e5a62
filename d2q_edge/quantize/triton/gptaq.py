"""The error feedback inside one block of columns (gptaq.quantize_block) as one Triton kernel.

Rows don't influence each other: a program has a few of them, and takes one group after another. Knows the arithmetic
only. Results differ from torch's in the last bits, and where two codebooks or codes are equally good.
"""

import torch
import triton
import triton.language as tl

from d2q_edge.formats.tensor_types import GROUP
from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.triton.codebook_search import best_book, block_scales, constants
from d2q_edge.quantize.triton.feedback import round_rows
from d2q_edge.quantize.triton.support import rows_per_program


@triton.jit  # type: ignore[untyped-decorator]
def _quantize_block(  # type: ignore[no-untyped-def]
    work, scales, table, levels, factor, lead, inverses,
    books, codes, quantized, errors,
    rows,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, HAS_LEAD: tl.constexpr, ROWS: tl.constexpr,
    N: tl.constexpr, V: tl.constexpr, K: tl.constexpr, BINS: tl.constexpr, KNEE: tl.constexpr, EDGE: tl.constexpr,
    SHORTLIST: tl.constexpr, BOOKS: tl.constexpr,
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
        book, _ = best_book(work + start, scale, live, table, levels, N, V, K, BINS, KNEE, EDGE, SHORTLIST, BOOKS, ROWS)
        tl.store(books + row * GROUPS + group, book.to(tl.uint8), mask=live)
        place = start[:, None] + column[None, :]
        square = first * SIZE + first
        code, found, lost, seen = round_rows(
            tl.load(work + place, mask=alive, other=0.0), book, scale, levels,
            factor + square, lead + square, SIZE, inverses + group * (N * V * V),
            GROUP, K, V, HAS_LEAD, ROWS,
        )  # fmt: skip
        beside = (row * GROUPS + group)[:, None] * N + column[None, :] // V
        tl.store(codes + beside, code.to(tl.uint8), mask=alive & (column[None, :] % V == 0))
        tl.store(quantized + place, found, mask=alive)
        tl.store(errors + place, lost, mask=alive)
        tl.store(work + place, seen, mask=alive)
        for later in range(group + 1, GROUPS):
            ahead = (later - group) * GROUP
            tile = tl.load(work + place + ahead, mask=alive, other=0.0)
            tile -= tl.dot(lost, tl.load(factor + square + ahead + inside), input_precision="ieee")
            if HAS_LEAD:
                tile += tl.dot(seen, tl.load(lead + square + ahead + inside), input_precision="ieee")
            tl.store(work + place + ahead, tile, mask=alive)
        # The next group reads what other threads of this program have written.
        tl.debug_barrier()


def quantize_block(
    search: CodebookSearch,
    weights: torch.Tensor,
    factor: torch.Tensor,
    lead: torch.Tensor | None,
    inverses: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """As gptaq.quantize_block."""
    kind = search.tensor_type
    rows, size = weights.shape
    work = weights.clone(memory_format=torch.contiguous_format)
    # q4_0's blocks are groups, and its codes in the order of the columns.
    scales = block_scales(search, work) if kind.switched else search.block_scales(work)
    books = torch.empty(rows, kind.groups, dtype=torch.uint8, device=work.device)
    codes = torch.empty(rows, kind.codes(size), dtype=torch.uint8, device=work.device)
    quantized, errors = torch.empty_like(work), torch.empty_like(work)
    factor = factor.contiguous()
    together = rows_per_program(rows, work.device)
    _quantize_block[(triton.cdiv(rows, together),)](
        work, scales, search.short_table, search.columns, factor, factor if lead is None else lead.contiguous(),
        inverses.contiguous(), books, codes, quantized, errors, rows,
        GROUPS=kind.groups, GROUP=GROUP, HAS_LEAD=lead is not None, ROWS=together, num_stages=1, **constants(search),
    )  # fmt: skip
    return scales, books, codes, quantized, errors, work
