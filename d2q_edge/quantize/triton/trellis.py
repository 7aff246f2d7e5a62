"""Find the best codebook and codes of scalars by Viterbi's algorithm in Triton, as quantize/trellis.py does."""

import torch
import triton
import triton.language as tl

from d2q_edge.formats.codebooks import CHAIN

CHAINS = 128
"""Chains per program."""


@triton.jit  # type: ignore[untyped-decorator]
def _best_codes(  # type: ignore[no-untyped-def]
    values, levels, codebooks, codes, chains,
    PER_GROUP: tl.constexpr, CHAIN: tl.constexpr, WAYS: tl.constexpr, CHAINS: tl.constexpr,
):  # fmt: skip
    chain = tl.program_id(0) * CHAINS + tl.arange(0, CHAINS)
    live = chain < chains
    table = levels + tl.load(codebooks + chain // PER_GROUP, mask=live, other=0) * (2 * WAYS)
    place = chain.to(tl.int64) * CHAIN
    cost0 = tl.zeros([CHAINS], tl.float32)
    cost1 = tl.full([CHAINS], float("inf"), tl.float32)
    # The ways into both states, three bits per weight.
    ways0 = tl.zeros([CHAINS], tl.int64)
    ways1 = tl.zeros([CHAINS], tl.int64)
    for index in range(CHAIN):
        value = tl.load(values + place + index, mask=live, other=0.0)
        best0 = tl.full([CHAINS], float("inf"), tl.float32)
        best1 = best0
        from0 = tl.zeros([CHAINS], tl.int64)
        from1 = from0
        for way in tl.static_range(WAYS):
            before = cost0 if way < WAYS // 2 else cost1
            off0 = value - tl.load(table + way)
            off1 = value - tl.load(table + WAYS + way)
            total0 = before + off0 * off0
            total1 = before + off1 * off1
            from0 = tl.where(total0 < best0, way, from0)
            from1 = tl.where(total1 < best1, way, from1)
            best0 = tl.minimum(best0, total0)
            best1 = tl.minimum(best1, total1)
        cost0, cost1 = best0, best1
        ways0 |= from0 << (3 * index)
        ways1 |= from1 << (3 * index)
    state = tl.where(cost1 < cost0, 1, 0)
    for back in range(CHAIN):
        index = CHAIN - 1 - back
        way = ((tl.where(state == 1, ways1, ways0) >> (3 * index)) & (WAYS - 1)).to(tl.int32)
        tl.store(codes + place + index, (way % (WAYS // 2) * 2 + state).to(tl.uint8), mask=live)
        state = way // (WAYS // 2)


@triton.jit  # type: ignore[untyped-decorator]
def best_path_codebook(  # type: ignore[no-untyped-def]
    place, scale, live, planes, N: tl.constexpr, K: tl.constexpr, CODEBOOKS: tl.constexpr, ROWS: tl.constexpr
):
    """Find the codebook whose best path is the best, of all codebooks, for the groups whose values begin at `place`.

    Args:
        place: pointers to the values of ROWS groups.
        scale: what the values are divided by, float32 [ROWS].
        live: which of the groups exist, bool [ROWS].
        planes: pointer to the entries by index, float32 [K, codebooks].

    Returns:
        The codebooks, int32 [ROWS], and their errors in units of the scale squared, float32 [ROWS].
    """
    CHAIN: tl.constexpr = 16
    HALF: tl.constexpr = K // 4
    entry = planes + tl.arange(0, CODEBOOKS)
    # Half of the squared errors, less those of zeros.
    total = tl.zeros([ROWS, CODEBOOKS], tl.float32)
    square = tl.zeros([ROWS], tl.float32)
    for chain in tl.static_range(N // CHAIN):
        cost0 = tl.zeros([ROWS, CODEBOOKS], tl.float32)
        cost1 = tl.full([ROWS, CODEBOOKS], float("inf"), tl.float32)
        for index in range(CHAIN):
            value = tl.load(place + chain * CHAIN + index, mask=live, other=0.0) / scale
            square += value * value
            next0 = tl.full([ROWS, CODEBOOKS], float("inf"), tl.float32)
            next1 = next0
            for state in tl.static_range(2):
                best0 = tl.full([ROWS, CODEBOOKS], float("inf"), tl.float32)
                best1 = best0
                for pair in tl.static_range(HALF):
                    even = tl.load(entry + (state * (K // 2) + 2 * pair) * CODEBOOKS)
                    odd = tl.load(entry + (state * (K // 2) + 2 * pair + 1) * CODEBOOKS)
                    best0 = tl.minimum(best0, (even * even * 0.5)[None, :] - value[:, None] * even[None, :])
                    best1 = tl.minimum(best1, (odd * odd * 0.5)[None, :] - value[:, None] * odd[None, :])
                before = cost0 if state == 0 else cost1
                next0 = tl.minimum(next0, before + best0)
                next1 = tl.minimum(next1, before + best1)
            cost0, cost1 = next0, next1
        total += tl.minimum(cost0, cost1)
    return tl.argmin(total, 1), 2 * tl.min(total, 1) + square


def best_codes(values: torch.Tensor, levels: torch.Tensor, codebooks: torch.Tensor) -> torch.Tensor:
    """Find the codes of the best paths, as trellis.best_codes."""
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    chains = values.numel() // CHAIN
    _best_codes[(triton.cdiv(chains, CHAINS),)](
        values.contiguous(), levels, codebooks, codes, chains,
        PER_GROUP=values.shape[1] // CHAIN, CHAIN=CHAIN, WAYS=levels.shape[2], CHAINS=CHAINS,
    )  # fmt: skip
    return codes
