"""The two searches of codebook.py as one Triton kernel each: the errors of a group in all 256 codebooks stay in
registers, instead of going to memory and back for every step.

Knows the arithmetic only. Imported where there is a CUDA device and Triton; results differ from codebook.py's in the
last bits, and where two codebooks are equally good.
"""

import torch
import triton
import triton.language as tl

GROUPS = 4
"""Groups per program."""
BOOKS = 256


@triton.jit  # type: ignore[untyped-decorator]
def _bin(values, BINS: tl.constexpr, KNEE: tl.constexpr, EDGE: tl.constexpr):  # type: ignore[no-untyped-def]
    position = values / (tl.abs(values) + KNEE) * (BINS / 2 / EDGE) + BINS / 2
    return tl.minimum(tl.maximum(position.to(tl.int32), 0), BINS - 1)


@triton.jit  # type: ignore[untyped-decorator]
def _ranks(  # type: ignore[no-untyped-def]
    vectors, scale, table, group, live,
    N: tl.constexpr, V: tl.constexpr, BINS: tl.constexpr, KNEE: tl.constexpr, EDGE: tl.constexpr,
    BOOKS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Errors of every codebook [GROUPS, BOOKS] by the table."""
    book = tl.arange(0, BOOKS)
    total = tl.zeros([GROUPS, BOOKS], tl.float32)
    for index in range(N):
        place = vectors + (group * N + index) * V
        entry = _bin(tl.load(place, mask=live, other=0.0) / scale, BINS, KNEE, EDGE)
        if V == 2:
            entry = entry * BINS + _bin(tl.load(place + 1, mask=live, other=0.0) / scale, BINS, KNEE, EDGE)
        total += tl.load(table + entry[:, None] * BOOKS + book[None, :])
    return total


@triton.jit  # type: ignore[untyped-decorator]
def _search(  # type: ignore[no-untyped-def]
    vectors, table, levels, books, errors, groups,
    N: tl.constexpr, V: tl.constexpr, K: tl.constexpr, BINS: tl.constexpr, KNEE: tl.constexpr, EDGE: tl.constexpr,
    SHORTLIST: tl.constexpr, BOOKS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    live = group < groups
    one = tl.full([GROUPS], 1.0, tl.float32)
    ranks = _ranks(vectors, one, table, group, live, N, V, BINS, KNEE, EDGE, BOOKS, GROUPS)
    place = vectors + (group[:, None] * N + tl.arange(0, N)[None, :]) * V
    first = tl.load(place, mask=live[:, None], other=0.0)
    second = first
    if V == 2:
        second = tl.load(place + 1, mask=live[:, None], other=0.0)
    best = tl.full([GROUPS], float("inf"), tl.float32)
    chosen = tl.zeros([GROUPS], tl.int32)
    for _ in range(SHORTLIST):
        candidate = tl.argmin(ranks, 1)
        ranks = tl.where(tl.arange(0, BOOKS)[None, :] == candidate[:, None], float("inf"), ranks)
        entry = levels + candidate[:, None] * (K * V) + tl.arange(0, K)[None, :] * V
        off = first[:, :, None] - tl.load(entry)[:, None, :]
        square = off * off
        if V == 2:
            off = second[:, :, None] - tl.load(entry + 1)[:, None, :]
            square += off * off
        error = tl.sum(tl.min(square, 2), 1)
        better = error < best
        best = tl.where(better, error, best)
        chosen = tl.where(better, candidate, chosen)
    tl.store(books + group, chosen.to(tl.int64), mask=live)
    tl.store(errors + group, best, mask=live)


@triton.jit  # type: ignore[untyped-decorator]
def _ranked_error(  # type: ignore[no-untyped-def]
    vectors, scales, table, errors, groups, edge, nearest, reach,
    PER_ROW: tl.constexpr, N: tl.constexpr, V: tl.constexpr, BINS: tl.constexpr, KNEE: tl.constexpr,
    EDGE: tl.constexpr, BOOKS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    live = group < groups
    scale = tl.load(scales + group // PER_ROW, mask=live, other=1.0)
    ranks = _ranks(vectors, scale, table, group, live, N, V, BINS, KNEE, EDGE, BOOKS, GROUPS)
    values = vectors + group[:, None] * (N * V) + tl.arange(0, N * V)[None, :]
    size = tl.abs(tl.load(values, mask=live[:, None], other=0.0) / scale[:, None])
    beyond = tl.where(size > reach, (size - edge) * (size - edge) - nearest, 0.0)
    tl.store(errors + group, tl.min(ranks, 1) + tl.sum(beyond, 1), mask=live)


def search(
    vectors: torch.Tensor, table: torch.Tensor, levels: torch.Tensor, shortlist: int, knee: float, edge: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As CodebookSearch.search.

    Args:
        vectors: float32 [groups, N, V], in units of d.
        table: float32 [bins ** V, 256], the errors of binned vectors.
        levels: float32 [256, K, V].
        shortlist: how many codebooks are measured exactly.
        knee, edge: of the bins.
    """
    groups, count, width = vectors.shape
    books = torch.empty(groups, dtype=torch.int64, device=vectors.device)
    errors = torch.empty(groups, device=vectors.device)
    _search[(triton.cdiv(groups, GROUPS),)](
        vectors.contiguous(), table, levels, books, errors, groups,
        N=count, V=width, K=levels.shape[1], BINS=_bins(table, width), KNEE=knee, EDGE=edge,
        SHORTLIST=shortlist, BOOKS=BOOKS, GROUPS=GROUPS,
    )  # fmt: skip
    return books, errors


def ranked_error(
    vectors: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    knee: float,
    edge: float,
    reach: float,
    largest: float,
) -> torch.Tensor:
    """As CodebookSearch._ranked_error.

    Args:
        vectors: float32 [rows * n, N, V].
        scales: float32 [rows], what they are divided by.
        table: float32 [bins ** V, 256], the errors of binned vectors.
        knee, edge: of the bins.
        reach: where the table ends.
        largest: magnitude of an entry of the codebooks.
    """
    groups, count, width = vectors.shape
    errors = torch.empty(groups, device=vectors.device)
    _ranked_error[(triton.cdiv(groups, GROUPS),)](
        vectors.contiguous(), scales.contiguous(), table, errors, groups, largest, (reach - largest) ** 2, reach,
        PER_ROW=groups // len(scales), N=count, V=width, BINS=_bins(table, width), KNEE=knee, EDGE=edge,
        BOOKS=BOOKS, GROUPS=GROUPS,
    )  # fmt: skip
    return errors.view(len(scales), -1).sum(1)


def _bins(table: torch.Tensor, width: int) -> int:
    return int(len(table) ** (1 / width) + 0.5)
