"""Search codebooks and block scales in Triton: a group's errors in all 256 codebooks stay in registers."""

from functools import cache

import torch
import triton
import triton.language as tl

from d2q_edge.formats.tensor_types import GROUP, SCALE_MAX, SCALE_TINY
from d2q_edge.quantize.codebook_search import (
    EDGE,
    KNEE,
    REACH,
    SCALE_STEPS,
    SHORTLIST,
    CodebookSearch,
)
from d2q_edge.quantize.triton.trellis import best_path_codebook

GROUPS = 4
"""Groups per program of the codebook search."""
WINDOWED_GROUPS = 8
"""The same where all codebooks are measured."""
BLOCKS = 16
"""Groups per program of the search for scales, a few whole blocks; the fastest number on an H200."""


@triton.jit  # type: ignore[untyped-decorator]
def _bin(values, BINS: tl.constexpr, KNEE: tl.constexpr, EDGE: tl.constexpr):  # type: ignore[no-untyped-def]
    position = values / (tl.abs(values) + KNEE) * (BINS / 2 / EDGE) + BINS / 2
    return tl.minimum(tl.maximum(position.to(tl.int32), 0), BINS - 1)


@triton.jit  # type: ignore[untyped-decorator]
def _ranks(  # type: ignore[no-untyped-def]
    place, scale, live, table,
    N: tl.constexpr, V: tl.constexpr, BINS: tl.constexpr, KNEE: tl.constexpr, EDGE: tl.constexpr,
    CODEBOOKS: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Rank the codebooks [ROWS, CODEBOOKS] by the table, for the groups whose values begin at `place` [ROWS]."""
    codebook = tl.arange(0, CODEBOOKS)
    total = tl.zeros([ROWS, CODEBOOKS], tl.float32)
    for index in tl.range(0, N, loop_unroll_factor=UNROLL):
        entry = _bin(tl.load(place + index * V, mask=live, other=0.0) / scale, BINS, KNEE, EDGE)
        if V == 2:
            second = tl.load(place + index * V + 1, mask=live, other=0.0) / scale
            entry = entry * BINS + _bin(second, BINS, KNEE, EDGE)
        total += tl.load(table + entry[:, None] * CODEBOOKS + codebook[None, :]).to(tl.float32)
    return total


@triton.jit  # type: ignore[untyped-decorator]
def best_codebook(  # type: ignore[no-untyped-def]
    place, scale, live, table, levels,
    N: tl.constexpr, V: tl.constexpr, K: tl.constexpr, BINS: tl.constexpr, KNEE: tl.constexpr, EDGE: tl.constexpr,
    SHORTLIST: tl.constexpr, CODEBOOKS: tl.constexpr, WINDOWED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Find the best codebook of the groups whose values begin at `place` [ROWS]; all are measured where there are few.

    Args:
        scale: what the values are divided by, float32 [ROWS].
        live: which of the groups exist, bool [ROWS].
        table: pointer to the rank table, or to the entries by index, [16, codebooks], of windowed types.
        levels: pointer to the entries [codebooks, V, K].

    Returns:
        The codebooks, int32 [ROWS], and their errors in units of the scale squared, float32 [ROWS].
    """
    if WINDOWED:
        return best_path_codebook(place, scale, live, table, N, K, CODEBOOKS, ROWS)
    # As wide as a group, so that the same few threads do all of a row.
    lane = tl.arange(0, N * V) % K
    best = tl.full([ROWS], float("inf"), tl.float32)
    chosen = tl.zeros([ROWS], tl.int32)
    if CODEBOOKS > SHORTLIST:
        ranks = _ranks(place, scale, live, table, N, V, BINS, KNEE, EDGE, CODEBOOKS, ROWS, 4)
    for turn in range(SHORTLIST if CODEBOOKS > SHORTLIST else CODEBOOKS):
        if CODEBOOKS > SHORTLIST:
            candidate = tl.argmin(ranks, 1)
            ranks = tl.where(tl.arange(0, CODEBOOKS)[None, :] == candidate[:, None], float("inf"), ranks)
        else:
            candidate = tl.zeros([ROWS], tl.int32) + turn
        entry = levels + candidate[:, None] * (K * V) + lane[None, :]
        level0 = tl.load(entry)
        level1 = level0
        if V == 2:
            level1 = tl.load(entry + K)
        error = tl.zeros([ROWS], tl.float32)
        for index in tl.range(0, N, loop_unroll_factor=4):
            off = (tl.load(place + index * V, mask=live, other=0.0) / scale)[:, None] - level0
            square = off * off
            if V == 2:
                off = (tl.load(place + index * V + 1, mask=live, other=0.0) / scale)[:, None] - level1
                square += off * off
            error += tl.min(square, 1)
        better = error < best
        best = tl.where(better, error, best)
        chosen = tl.where(better, candidate, chosen)
    return chosen, best


@triton.jit  # type: ignore[untyped-decorator]
def _search(  # type: ignore[no-untyped-def]
    vectors, table, levels, codebooks, errors, groups,
    N: tl.constexpr, V: tl.constexpr, K: tl.constexpr, BINS: tl.constexpr, KNEE: tl.constexpr, EDGE: tl.constexpr,
    SHORTLIST: tl.constexpr, CODEBOOKS: tl.constexpr, WINDOWED: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    live = group < groups
    one = tl.full([GROUPS], 1.0, tl.float32)
    chosen, best = best_codebook(
        vectors + group * (N * V), one, live, table, levels,
        N, V, K, BINS, KNEE, EDGE, SHORTLIST, CODEBOOKS, WINDOWED, GROUPS,
    )  # fmt: skip
    tl.store(codebooks + group, chosen.to(tl.int64), mask=live)
    tl.store(errors + group, best, mask=live)


@triton.jit  # type: ignore[untyped-decorator]
def _block_scales(  # type: ignore[no-untyped-def]
    weights, table, scales, factors, begins, blocks, stride, unit, edge, nearest, reach, tiny, huge,
    STEPS: tl.constexpr, PER_BLOCK: tl.constexpr, N: tl.constexpr, V: tl.constexpr, BINS: tl.constexpr,
    KNEE: tl.constexpr, EDGE: tl.constexpr, CODEBOOKS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    # One entry per group; what belongs to a block is the same in all of its groups.
    COUNT: tl.constexpr = GROUPS // PER_BLOCK
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    block = group // PER_BLOCK
    live = block < blocks
    place = weights + block * stride + (group % PER_BLOCK) * (N * V)
    values = tl.load(place[:, None] + tl.arange(0, N * V)[None, :], mask=live[:, None], other=0.0)
    power = tl.sum(tl.reshape(tl.sum(values * values, 1), [COUNT, PER_BLOCK]), 1)
    base = tl.sqrt(power / (PER_BLOCK * N * V)) / unit
    base = tl.reshape(tl.broadcast_to(base[:, None], [COUNT, PER_BLOCK]), [GROUPS])
    scale = tl.minimum(tl.maximum(base, tiny), huge).to(tl.float16).to(tl.float32)
    center = scale
    best = tl.full([GROUPS], float("inf"), tl.float32)
    for step in range(STEPS):
        center = tl.where(tl.load(begins + step) != 0, scale, center)
        trial = tl.minimum(tl.maximum(center * tl.load(factors + step), tiny), huge).to(tl.float16).to(tl.float32)
        ranks = _ranks(place, trial, live, table, N, V, BINS, KNEE, EDGE, CODEBOOKS, GROUPS, 1)
        size = tl.abs(values / trial[:, None])
        beyond = tl.where(size > reach, (size - edge) * (size - edge) - nearest, 0.0)
        error = tl.sum(tl.reshape(tl.min(ranks, 1) + tl.sum(beyond, 1), [COUNT, PER_BLOCK]), 1)
        error = trial * trial * tl.reshape(tl.broadcast_to(error[:, None], [COUNT, PER_BLOCK]), [GROUPS])
        better = error < best
        best = tl.where(better, error, best)
        scale = tl.where(better, trial, scale)
    tl.store(scales + block, scale, mask=live & (group % PER_BLOCK == 0))


def search(table: CodebookSearch, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the best codebook of each group, as CodebookSearch.search."""
    groups = len(vectors)
    codebooks = torch.empty(groups, dtype=torch.int64, device=vectors.device)
    errors = torch.empty(groups, device=vectors.device)
    _search[(triton.cdiv(groups, GROUPS),)](
        vectors.contiguous(), rank_table(table), table.columns, codebooks, errors, groups,
        GROUPS=WINDOWED_GROUPS if table.tensor_type.windowed else GROUPS, **search_constants(table),
    )  # fmt: skip
    return codebooks, errors


def block_scales(table: CodebookSearch, blocks: torch.Tensor) -> torch.Tensor:
    """Choose block scales by the approximate error of SCALE_STEPS, of blocks [rows, block_size] in code order."""
    groups, (factors, begins) = table.tensor_type.groups, _steps(blocks.device)
    scales = torch.empty(len(blocks), device=blocks.device)
    _block_scales[(triton.cdiv(len(blocks) * groups, BLOCKS),)](
        blocks, table.error_table_f16, scales, factors, begins, len(blocks), blocks.stride(0),
        table.unit, table.edge, (REACH - table.edge) ** 2, REACH, SCALE_TINY, SCALE_MAX,
        STEPS=len(factors), PER_BLOCK=groups, GROUPS=BLOCKS, **_table_constants(table),
    )  # fmt: skip
    return scales


@cache
def _steps(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Concatenate SCALE_STEPS, float32, and mark where each of its parts begins, int32."""
    factors = [factor for part in SCALE_STEPS for factor in part]
    begins = [int(at == 0) for part in SCALE_STEPS for at in range(len(part))]
    return torch.tensor(factors, device=device), torch.tensor(begins, dtype=torch.int32, device=device)


def search_constants(table: CodebookSearch) -> dict[str, int | float]:
    """Return what a kernel with `best_codebook` is compiled for."""
    windowed = table.tensor_type.windowed
    return {**_table_constants(table), "K": table.levels.shape[1], "SHORTLIST": SHORTLIST, "WINDOWED": windowed}


def rank_table(table: CodebookSearch) -> torch.Tensor:
    """Return the table that `best_codebook` reads."""
    return table.planes if table.tensor_type.windowed else table.error_table_f16


def _table_constants(table: CodebookSearch) -> dict[str, int | float]:
    codebooks, _, width = table.levels.shape
    return {"N": GROUP // width, "V": width, "BINS": table.bins, "KNEE": KNEE, "EDGE": EDGE, "CODEBOOKS": codebooks}
