"""Feed back errors inside a group in Triton: the 32 columns of some rows stay in registers until all have their codes.

It is the counterpart of quantize/feedback.py, and a part of the kernels of gptaq.py and descent.py.
"""

from functools import cache

import torch
import triton
import triton.language as tl


@triton.jit
def _better(cost, code, x, y, other_cost, other_code, other_x, other_y):  # type: ignore[no-untyped-def]
    """Return the cheaper of two entries; of equal ones the first."""
    other = (other_cost < cost) | ((other_cost == cost) & (other_code < code))
    cost, code = tl.where(other, other_cost, cost), tl.where(other, other_code, code)
    return cost, code, tl.where(other, other_x, x), tl.where(other, other_y, y)


@triton.jit  # type: ignore[untyped-decorator]
def quantize_rows(  # type: ignore[no-untyped-def]
    work, codebook, scale, levels, U, P, stride, inv_U_jj,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HAS_P: tl.constexpr, WINDOWED: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Quantize one group of some rows, as feedback.quantize_group. Columns and entries are 32 wide, so that the same
    few threads do all steps of a row and need not wait for others.

    Args:
        work: w, float32 [ROWS, 32].
        codebook: int32 [ROWS].
        scale: float32 [ROWS].
        levels: pointer to the entries, [codebooks, V, K].
        U, P: pointers to the group's diagonal blocks, rows `stride` apart.
        inv_U_jj: pointer to those of the group, [32 / V, V, V].

    Returns:
        Every column's code, int32 [ROWS, 32], and quantized, errors and compensated, float32 [ROWS, 32].
    """
    if WINDOWED:
        return _quantize_windowed_rows(work, codebook, scale, levels, U, P, stride, inv_U_jj, GROUP, K, HAS_P, ROWS)
    column = tl.arange(0, GROUP)
    entry = column % K
    table = levels + codebook[:, None] * (K * V)
    level0 = tl.load(table + entry[None, :]) * scale[:, None]
    level1 = level0
    if V == 2:
        level1 = tl.load(table + K + entry[None, :]) * scale[:, None]
    place = tl.broadcast_to(entry[None, :], [ROWS, GROUP])
    codes = tl.zeros([ROWS, GROUP], tl.int32)
    lost = tl.zeros([ROWS, GROUP], tl.float32)
    for index in range(GROUP // V):
        first = index * V
        here0 = column[None, :] == first
        wanted0 = tl.sum(tl.where(here0, work, 0.0), 1)[:, None]
        inverse = inv_U_jj + index * V * V
        row = U + first * stride + column[None, :]
        if V == 2:
            here1 = column[None, :] == first + 1
            wanted1 = tl.sum(tl.where(here1, work, 0.0), 1)[:, None]
            off0, off1 = wanted0 - level0, wanted1 - level1
            error0 = off0 * tl.load(inverse) + off1 * tl.load(inverse + 2)
            error1 = off0 * tl.load(inverse + 1) + off1 * tl.load(inverse + 3)
            cost = error0 * error0 + error1 * error1
        else:
            wanted1 = wanted0
            error0 = (wanted0 - level0) * tl.load(inverse)
            error1 = error0
            cost = error0 * error0
        _least, code, loss0, loss1 = tl.reduce((cost, place, error0, error1), 1, _better)
        loss0, loss1 = loss0[:, None], loss1[:, None]
        codes = tl.where(column[None, :] // V == index, code[:, None], codes)
        lost = tl.where(here0, loss0, lost)
        change = loss0 * tl.load(row)
        if HAS_P:
            change -= wanted0 * tl.load(P + first * stride + column[None, :])
        if V == 2:
            lost = tl.where(here1, loss1, lost)
            change += loss1 * tl.load(row + stride)
            if HAS_P:
                change -= wanted1 * tl.load(P + (first + 1) * stride + column[None, :])
        work = tl.where(column[None, :] >= first + V, work - change, work)
    found = tl.load(table + (column % V)[None, :] * K + codes) * scale[:, None]
    return codes, found, lost, work


@triton.jit  # type: ignore[untyped-decorator]
def _survivor(  # type: ignore[no-untyped-def]
    cost, lane, lost, wanted, state, U, P, work0, work1, indices0, indices1, here, later,
    K: tl.constexpr, HAS_P: tl.constexpr,
):  # fmt: skip
    """Extend the cheapest path into a state: its cost [ROWS], and weights and indices of entries [ROWS, 32]."""
    least = tl.where(lane // 4 % 2 == state, cost, float("inf"))
    least, best, error, w = tl.reduce((least, lane, lost, wanted), 1, _better)
    best = best[:, None]
    first = best // 8 == 0
    work = tl.where(first, work0, work1)
    change = error[:, None] * U
    if HAS_P:
        change -= w[:, None] * P
    indices = tl.where(first, indices0, indices1)
    indices = tl.where(here, best // 8 * (K // 2) + best % 4 * 2 + state, indices)
    return least, tl.where(later, work - change, work), indices


@triton.jit  # type: ignore[untyped-decorator]
def _quantize_windowed_rows(  # type: ignore[no-untyped-def]
    work, codebook, scale, levels, U, P, stride, inv_U_jj,
    GROUP: tl.constexpr, K: tl.constexpr, HAS_P: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Quantize one group of some rows as `quantize_rows`, where an entry also depends on the code before.

    One survivor per state is kept. Lanes are ways, those from state 0 first: lane = 8 * state + 4 * next state + code
    // 2, twice over 32 columns.
    """
    CHAIN: tl.constexpr = 16
    column = tl.arange(0, GROUP)[None, :]
    lane = tl.broadcast_to(column % K, [ROWS, GROUP])
    table = levels + codebook[:, None] * K
    level = tl.load(table + lane // 8 * (K // 2) + lane % 4 * 2 + lane // 4 % 2) * scale[:, None]
    work0, work1 = work, work
    indices0 = tl.zeros([ROWS, GROUP], tl.int32)
    indices1 = indices0
    for chain in tl.static_range(GROUP // CHAIN):
        cost0 = tl.zeros([ROWS], tl.float32)
        cost1 = tl.full([ROWS], float("inf"), tl.float32)
        for step in range(CHAIN):
            index = chain * CHAIN + step
            here = column == index
            later = column > index
            wanted0 = tl.sum(tl.where(here, work0, 0.0), 1)[:, None]
            wanted1 = tl.sum(tl.where(here, work1, 0.0), 1)[:, None]
            wanted = tl.where(lane // 8 == 0, wanted0, wanted1)
            lost = (wanted - level) * tl.load(inv_U_jj + index)
            cost = tl.where(lane // 8 == 0, cost0[:, None], cost1[:, None]) + lost * lost
            row_U = tl.load(U + index * stride + column)
            row_P = row_U
            if HAS_P:
                row_P = tl.load(P + index * stride + column)
            next0, ahead0, found0 = _survivor(
                cost, lane, lost, wanted, 0, row_U, row_P, work0, work1, indices0, indices1, here, later, K, HAS_P
            )
            next1, ahead1, found1 = _survivor(
                cost, lane, lost, wanted, 1, row_U, row_P, work0, work1, indices0, indices1, here, later, K, HAS_P
            )
            cost0, cost1, work0, work1, indices0, indices1 = next0, next1, ahead0, ahead1, found0, found1
        second = (cost1 < cost0)[:, None]
        work0 = tl.where(second, work1, work0)
        indices0 = tl.where(second, indices1, indices0)
    found = tl.load(table + indices0) * scale[:, None]
    lost = (work0 - found) * tl.load(inv_U_jj + column)
    return indices0 % (K // 2), found, lost, work0


def rows_per_program(rows: int, device: torch.device) -> int:
    """Return how many of a matrix's rows a program takes: 16, or 8 where few programs would wait for themselves."""
    # The limit was measured on an H200 with 1024 to 24576 rows.
    return 8 if rows < 24 * _processors(device) else 16


@cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1
