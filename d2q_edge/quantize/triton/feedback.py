"""The loop of feedback.py in Triton: 32 columns of some rows stay in registers until all have their codes.

Knows the arithmetic only. It is a part of the kernels of gptaq_cuda.py and descent_cuda.py.
"""

import triton
import triton.language as tl


@triton.jit
def _better(cost, code, x, y, other_cost, other_code, other_x, other_y):  # type: ignore[no-untyped-def]
    """The cheaper one of two entries; of equal ones the first."""
    other = (other_cost < cost) | ((other_cost == cost) & (other_code < code))
    return (
        tl.where(other, other_cost, cost),
        tl.where(other, other_code, code),
        tl.where(other, other_x, x),
        tl.where(other, other_y, y),
    )


@triton.jit  # type: ignore[untyped-decorator]
def round_rows(  # type: ignore[no-untyped-def]
    work, book, scale, levels, factor, lead, stride, inverses,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HAS_LEAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One group of some rows, as feedback.round_group. Everything is 32 wide, columns and entries, so that all steps of
    a row are done by the same few threads, which need not wait for others.

    Args:
        work: w, float32 [ROWS, 32].
        book: int32 [ROWS].
        scale: float32 [ROWS].
        levels: pointer to the table, [codebooks, V, K].
        factor, lead: pointers to the group's squares of U and P, rows `stride` apart.
        inverses: pointer to the group's corners [32 / V, V, V].

    Returns:
        Of every column its code, int32 [ROWS, 32], and float32 [ROWS, 32] quantized, errors and compensated.
    """
    column = tl.arange(0, GROUP)
    entry = column % K
    table = levels + book[:, None] * (K * V)
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
        corner = inverses + index * V * V
        row = factor + first * stride + column[None, :]
        if V == 2:
            here1 = column[None, :] == first + 1
            wanted1 = tl.sum(tl.where(here1, work, 0.0), 1)[:, None]
            off0, off1 = wanted0 - level0, wanted1 - level1
            error0 = off0 * tl.load(corner) + off1 * tl.load(corner + 2)
            error1 = off0 * tl.load(corner + 1) + off1 * tl.load(corner + 3)
            cost = error0 * error0 + error1 * error1
        else:
            wanted1 = wanted0
            error0 = (wanted0 - level0) * tl.load(corner)
            error1 = error0
            cost = error0 * error0
        _least, code, loss0, loss1 = tl.reduce((cost, place, error0, error1), 1, _better)
        loss0, loss1 = loss0[:, None], loss1[:, None]
        codes = tl.where(column[None, :] // V == index, code[:, None], codes)
        lost = tl.where(here0, loss0, lost)
        change = loss0 * tl.load(row)
        if HAS_LEAD:
            change -= wanted0 * tl.load(lead + first * stride + column[None, :])
        if V == 2:
            lost = tl.where(here1, loss1, lost)
            change += loss1 * tl.load(row + stride)
            if HAS_LEAD:
                change -= wanted1 * tl.load(lead + (first + 1) * stride + column[None, :])
        work = tl.where(column[None, :] >= first + V, work - change, work)
    found = tl.load(table + (column % V)[None, :] * K + codes) * scale[:, None]
    return codes, found, lost, work
