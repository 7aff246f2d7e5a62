"""Choosing the groups of one block of columns again (descent.choose_block) as one Triton kernel.

Rows don't influence each other: a program has a few of them, and takes one group after another. Knows the arithmetic
only. Results differ from torch's in the last bits, and where two codebooks or codes are equally good.
"""

import torch
import triton
import triton.language as tl

from d2q_edge.formats.tensor_types import GROUP
from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.triton.codebook_search import best_book, constants
from d2q_edge.quantize.triton.feedback import round_rows
from d2q_edge.quantize.triton.support import rows_per_program


@triton.jit
def _weighted(off, hessian):  # type: ignore[no-untyped-def]
    """Of every row (q - t) H (q - t)^T."""
    return tl.sum(tl.dot(off, hessian, input_precision="ieee") * off, 1)


@triton.jit  # type: ignore[untyped-decorator]
def _choose_block(  # type: ignore[no-untyped-def]
    gradient, units, books, codes, wanted,
    table, levels, hessian, inverses, factors, corners,
    rows,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    N: tl.constexpr, V: tl.constexpr, K: tl.constexpr, BINS: tl.constexpr, KNEE: tl.constexpr, EDGE: tl.constexpr,
    SHORTLIST: tl.constexpr, BOOKS: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = GROUPS * GROUP
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    alive = live[:, None]
    one = tl.full([ROWS], 1.0, tl.float32)
    # Here columns are in the order of the codes: those of one code side by side.
    column = tl.arange(0, GROUP)
    stored = (column % V) * N + column // V
    inside = stored[:, None] * SIZE + stored[None, :]
    own = wanted + row * GROUP
    for group in range(GROUPS):
        first = group * GROUP
        place = (row * SIZE + first)[:, None] + stored[None, :]
        square = hessian + first * SIZE + first
        near = tl.load(square + inside)
        present = tl.load(units + place, mask=alive, other=0.0)
        slope = tl.load(gradient + place, mask=alive, other=0.0)
        inverse = tl.load(inverses + first * GROUP + stored[:, None] * GROUP + stored[None, :])
        step = tl.dot(slope, inverse, input_precision="ieee")
        error = _weighted(step, near)
        target = present - step
        tl.store(own[:, None] + column[None, :], target, mask=alive)
        tl.debug_barrier()
        nearest, _error = best_book(own, one, live, table, levels, N, V, K, BINS, KNEE, EDGE, SHORTLIST, BOOKS, ROWS)
        beside = (row * GROUPS + group)[:, None] * N + column[None, :] // V
        kept = tl.load(books + row * GROUPS + group, mask=live, other=0).to(tl.int32)
        code = tl.load(codes + beside, mask=alive, other=0).to(tl.int32)
        # Only what is really better is taken: of the present codebook first, then of the nearest.
        chosen, book = present, kept
        for turn in tl.static_range(2):
            candidate = kept if turn == 0 else nearest
            trial, found, _lost, _seen = round_rows(
                target, candidate, one, levels, factors + first * GROUP, factors, GROUP,
                corners + group * (N * V * V), GROUP, K, V, False, ROWS,
            )  # fmt: skip
            trial_error = _weighted(found - target, near)
            better = trial_error < error
            error = tl.where(better, trial_error, error)
            chosen = tl.where(better[:, None], found, chosen)
            code = tl.where(better[:, None], trial, code)
            book = tl.where(better, candidate, book)
        tl.store(units + place, chosen, mask=alive)
        tl.store(books + row * GROUPS + group, book.to(tl.uint8), mask=live)
        tl.store(codes + beside, code.to(tl.uint8), mask=alive & (column[None, :] % V == 0))
        moved = chosen - present
        for later in range(group + 1, GROUPS):
            ahead = (later - group) * GROUP
            tile = tl.load(gradient + place + ahead, mask=alive, other=0.0)
            tile += tl.dot(moved, tl.load(square + ahead + inside), input_precision="ieee")
            tl.store(gradient + place + ahead, tile, mask=alive)
        # The next group reads what other threads of this program have written.
        tl.debug_barrier()


def choose_block(
    search: CodebookSearch,
    gradient: torch.Tensor,
    units: torch.Tensor,
    books: torch.Tensor,
    codes: torch.Tensor,
    hessian: torch.Tensor,
    inverses: torch.Tensor,
    factors: torch.Tensor,
    corners: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As descent.choose_block."""
    rows, groups = len(units), search.tensor_type.groups
    gradient, units, books, codes = (
        tensor.clone(memory_format=torch.contiguous_format) for tensor in (gradient, units, books, codes)
    )
    together = rows_per_program(rows, units.device)
    _choose_block[(triton.cdiv(rows, together),)](
        gradient, units, books, codes, units.new_empty(rows, GROUP),
        search.short_table, search.columns, *(each.contiguous() for each in (hessian, inverses, factors, corners)),
        rows,
        GROUPS=groups, GROUP=GROUP, ROWS=together, num_stages=1, **constants(search),
    )  # fmt: skip
    return units, books, codes
