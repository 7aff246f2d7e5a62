"""Choose the groups of one block of columns again (descent.choose_block) in one Triton kernel.

A program takes a few rows, which are independent, and one group after another.
"""

import torch
import triton
import triton.language as tl

from d2q_edge.formats.tensor_types import GROUP
from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.triton.codebook_search import best_codebook, rank_table, search_constants
from d2q_edge.quantize.triton.feedback import quantize_rows, rows_per_program


@triton.jit
def _weighted(off, hessian):  # type: ignore[no-untyped-def]
    """Return (q - t) H (q - t)^T of every row."""
    return tl.sum(tl.dot(off, hessian, input_precision="ieee") * off, 1)


@triton.jit  # type: ignore[untyped-decorator]
def _choose_block(  # type: ignore[no-untyped-def]
    gradient, units, codebooks, codes, scratch, table, levels, hessian, inv_H_gg, U, inv_U_jj, rows,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    N: tl.constexpr, V: tl.constexpr, K: tl.constexpr, BINS: tl.constexpr, KNEE: tl.constexpr, EDGE: tl.constexpr,
    SHORTLIST: tl.constexpr, CODEBOOKS: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = GROUPS * GROUP
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    alive = live[:, None]
    one = tl.full([ROWS], 1.0, tl.float32)
    # Here columns are in processing order: those of one code side by side.
    column = tl.arange(0, GROUP)
    stored = (column % V) * N + column // V
    inside = stored[:, None] * SIZE + stored[None, :]
    own = scratch + row * GROUP
    for group in range(GROUPS):
        first = group * GROUP
        place = (row * SIZE + first)[:, None] + stored[None, :]
        diagonal_block = hessian + first * SIZE + first
        H_gg = tl.load(diagonal_block + inside)
        present = tl.load(units + place, mask=alive, other=0.0)
        slope = tl.load(gradient + place, mask=alive, other=0.0)
        inverse = tl.load(inv_H_gg + first * GROUP + stored[:, None] * GROUP + stored[None, :])
        step = tl.dot(slope, inverse, input_precision="ieee")
        error = _weighted(step, H_gg)
        target = present - step
        tl.store(own[:, None] + column[None, :], target, mask=alive)
        tl.debug_barrier()
        nearest, _error = best_codebook(
            own, one, live, table, levels, N, V, K, BINS, KNEE, EDGE, SHORTLIST, CODEBOOKS, WINDOWED, ROWS
        )
        beside = (row * GROUPS + group)[:, None] * N + column[None, :] // V
        kept = tl.load(codebooks + row * GROUPS + group, mask=live, other=0).to(tl.int32)
        code = tl.load(codes + beside, mask=alive, other=0).to(tl.int32)
        # The present codebook first, then the nearest one; each is taken only where it is better.
        chosen, codebook = present, kept
        for turn in tl.static_range(2):
            candidate = kept if turn == 0 else nearest
            trial, found, _lost, _seen = quantize_rows(
                target, candidate, one, levels, U + first * GROUP, U, GROUP,
                inv_U_jj + group * (N * V * V), GROUP, K, V, False, WINDOWED, ROWS,
            )  # fmt: skip
            trial_error = _weighted(found - target, H_gg)
            better = trial_error < error
            error = tl.where(better, trial_error, error)
            chosen = tl.where(better[:, None], found, chosen)
            code = tl.where(better[:, None], trial, code)
            codebook = tl.where(better, candidate, codebook)
        tl.store(units + place, chosen, mask=alive)
        tl.store(codebooks + row * GROUPS + group, codebook.to(tl.uint8), mask=live)
        tl.store(codes + beside, code.to(tl.uint8), mask=alive & (column[None, :] % V == 0))
        moved = chosen - present
        for later in range(group + 1, GROUPS):
            ahead = (later - group) * GROUP
            tile = tl.load(gradient + place + ahead, mask=alive, other=0.0)
            tile += tl.dot(moved, tl.load(diagonal_block + ahead + inside), input_precision="ieee")
            tl.store(gradient + place + ahead, tile, mask=alive)
        # Other threads of this program have written what the next group reads.
        tl.debug_barrier()


def choose_block(search: CodebookSearch, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose the groups of one block of all rows again, as descent.choose_block, given its tensors in that order."""
    gradient, units, codebooks, codes = (tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors[:4])
    rows, together = len(units), rows_per_program(len(units), units.device)
    _choose_block[(triton.cdiv(rows, together),)](
        gradient, units, codebooks, codes, units.new_empty(rows, GROUP),
        rank_table(search), search.columns, *(tensor.contiguous() for tensor in tensors[4:]), rows,
        GROUPS=search.tensor_type.groups, GROUP=GROUP, ROWS=together, num_stages=1, **search_constants(search),
    )  # fmt: skip
    return units, codebooks, codes
