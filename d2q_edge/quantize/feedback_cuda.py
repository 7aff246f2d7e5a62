"""The loop of feedback.py as one Triton kernel: 32 columns of some rows stay in registers until all have their codes.

Knows the arithmetic only. Imported where there is a CUDA device and Triton; results differ from the loop's in the last
bits, and where two entries are equally good.
"""

import torch
import triton
import triton.language as tl

from d2q_edge.tensor_types import GROUP

FEW_ROWS = 16
"""Rows per program where a matrix has so few that the GPU isn't full otherwise."""
MANY_ROWS = {1: 64, 2: 128}
"""Rows per program where it has more, by the width of a code. (Both were the fastest on an H200.)"""
FULL = 16384
"""Rows from which on it is full."""


@triton.jit  # type: ignore[untyped-decorator]
def _round_group(  # type: ignore[no-untyped-def]
    targets, levels, books, scales, factor, inverses, lead,
    codes, quantized, errors, compensated,
    rows,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HAS_LEAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    column = tl.arange(0, GROUP)
    place = row[:, None] * GROUP + column[None, :]
    work = tl.load(targets + place, mask=live[:, None], other=0.0)
    scale = tl.load(scales + row, mask=live, other=0.0)
    entry = tl.load(books + row, mask=live, other=0)[:, None] * (K * V) + tl.arange(0, K)[None, :] * V
    level0 = tl.load(levels + entry) * scale[:, None]
    level1 = level0
    if V == 2:
        level1 = tl.load(levels + entry + 1) * scale[:, None]
    found = tl.zeros([ROWS, GROUP], tl.float32)
    lost = tl.zeros([ROWS, GROUP], tl.float32)
    for index in range(GROUP // V):
        first = index * V
        here0 = column[None, :] == first
        here1 = column[None, :] == first + 1
        wanted0 = tl.sum(tl.where(here0, work, 0.0), 1)
        off0 = wanted0[:, None] - level0
        corner = inverses + index * V * V
        if V == 2:
            wanted1 = tl.sum(tl.where(here1, work, 0.0), 1)
            off1 = wanted1[:, None] - level1
            error0 = off0 * tl.load(corner) + off1 * tl.load(corner + 2)
            error1 = off0 * tl.load(corner + 1) + off1 * tl.load(corner + 3)
            code = tl.argmin(error0 * error0 + error1 * error1, 1)
        else:
            wanted1 = wanted0
            error0 = off0 * tl.load(corner)
            error1 = error0
            code = tl.argmin(error0 * error0, 1)
        chosen = tl.arange(0, K)[None, :] == code[:, None]
        loss0 = tl.sum(tl.where(chosen, error0, 0.0), 1)[:, None]
        found = tl.where(here0, tl.sum(tl.where(chosen, level0, 0.0), 1)[:, None], found)
        lost = tl.where(here0, loss0, lost)
        change = loss0 * tl.load(factor + first * GROUP + column)[None, :]
        if HAS_LEAD:
            change -= wanted0[:, None] * tl.load(lead + first * GROUP + column)[None, :]
        if V == 2:
            loss1 = tl.sum(tl.where(chosen, error1, 0.0), 1)[:, None]
            found = tl.where(here1, tl.sum(tl.where(chosen, level1, 0.0), 1)[:, None], found)
            lost = tl.where(here1, loss1, lost)
            change += loss1 * tl.load(factor + (first + 1) * GROUP + column)[None, :]
            if HAS_LEAD:
                change -= wanted1[:, None] * tl.load(lead + (first + 1) * GROUP + column)[None, :]
        work = tl.where(column[None, :] >= first + V, work - change, work)
        tl.store(codes + row * (GROUP // V) + index, code.to(tl.uint8), mask=live)
    tl.store(quantized + place, found, mask=live[:, None])
    tl.store(errors + place, lost, mask=live[:, None])
    tl.store(compensated + place, work, mask=live[:, None])


def round_group(
    targets: torch.Tensor,
    levels: torch.Tensor,
    books: torch.Tensor,
    scales: torch.Tensor,
    factor: torch.Tensor,
    inverses: torch.Tensor,
    lead: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, quantized, errors and compensated, as feedback.round_group."""
    targets = targets.contiguous()
    rows, (_, entries, width) = len(targets), levels.shape
    per_program = FEW_ROWS if rows < FULL else MANY_ROWS[width]
    codes = torch.empty(rows, GROUP // width, dtype=torch.uint8, device=targets.device)
    quantized, errors, compensated = (torch.empty_like(targets) for _ in range(3))
    _round_group[(triton.cdiv(rows, per_program),)](
        targets, levels.contiguous(), books.contiguous(), scales.contiguous(), factor.contiguous(),
        inverses.contiguous(), (factor if lead is None else lead).contiguous(),
        codes, quantized, errors, compensated, rows,
        GROUP=GROUP, K=entries, V=width, HAS_LEAD=lead is not None, ROWS=per_program,
    )  # fmt: skip
    return codes, quantized, errors, compensated
