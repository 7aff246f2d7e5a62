"""Find the best codes of scalars by Viterbi's algorithm in Triton: quantize/trellis.py for many chains at once."""

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


def best_codes(values: torch.Tensor, levels: torch.Tensor, codebooks: torch.Tensor) -> torch.Tensor:
    """Find the codes of the best paths, as trellis.best_codes."""
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    chains = values.numel() // CHAIN
    _best_codes[(triton.cdiv(chains, CHAINS),)](
        values.contiguous(), levels, codebooks, codes, chains,
        PER_GROUP=values.shape[1] // CHAIN, CHAIN=CHAIN, WAYS=levels.shape[2], CHAINS=CHAINS,
    )  # fmt: skip
    return codes
