"""Find the best codes of scalars whose entries depend on the code before, by Viterbi's algorithm.

A state is the low bit of the code before. An entry's index is code + K * state, the next state is the code's low bit,
and every chain of 16 weights begins in state 0 (formats/codebooks.py). The idea is QTIP's bit-shift trellis (arXiv
2406.11235), so short that the table fits the register of a byte shuffle. Of all ways into a state only the cheapest can
be part of the best path, so that the search keeps one path per state.

Here the K ways into a state are side by side, those from state 0 first: `by_next_state` orders entries so.
"""

import torch

from d2q_edge.formats.codebooks import CHAIN, SCALAR_STATES
from d2q_edge.quantize import triton

CHUNK = 1 << 16
"""Chains whose paths are found at once: bounds the memory at about 50 MB."""


def by_next_state(levels: torch.Tensor) -> torch.Tensor:
    """Order the entries [..., 2 * K] of codebooks by the state that they lead to: [..., 2, K]."""
    split: torch.Tensor = levels.unflatten(-1, (SCALAR_STATES, -1, SCALAR_STATES))
    return split.movedim(-1, -3).flatten(-2).contiguous()


def cheapest_ways(errors: torch.Tensor, cost: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the cheapest way into every state.

    Args:
        errors: of the ways, float32 [..., 2, K].
        cost: of the paths so far, by their last state, float32 [..., 2].

    Returns:
        The costs, float32 [..., 2], and the ways, which `source` reads, int64 [..., 2].
    """
    total: torch.Tensor = errors.unflatten(-1, (SCALAR_STATES, -1)) + cost[..., None, :, None]
    least, way = total.flatten(-2).min(-1)
    return least, way


def source(way: torch.Tensor, state: torch.Tensor, ways: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the state before and the code of one of so many ways into a state."""
    half = ways // SCALAR_STATES
    return way // half, way % half * 2 + state


def first_cost(shape: torch.Size, device: torch.device) -> torch.Tensor:
    """Return the costs before a chain's first weight, float32 [*shape, 2]: zero of state 0, infinite of the other."""
    cost = torch.full((*shape, SCALAR_STATES), torch.inf, device=device)
    cost[..., 0] = 0
    return cost


def path_errors(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Return the squared errors of the best paths in several codebooks, float32 [groups, codebooks].

    Args:
        values: float32 [groups, 32].
        levels: entries by next state, float32 [groups, codebooks, 2, K].
    """
    groups, codebooks, states, _ = levels.shape
    # By next state and state; what a step is about, all groups and codebooks, is contiguous.
    entries = levels.permute(2, 3, 0, 1).reshape(states, states, -1, groups, codebooks).contiguous()
    half_squares = entries.square() / 2
    total = values.square().sum(1, keepdim=True)
    for chain in values.split(CHAIN, dim=1):
        cost = first_cost(torch.Size((groups, codebooks)), values.device).movedim(-1, 0)
        for value in chain.T:
            # Half of the squared error, less that of zeros.
            errors = torch.addcmul(half_squares, entries, value[:, None], value=-1)
            cost = errors.add_(cost[:, None]).amin((1, 2))
        total = total + 2 * cost.amin(0)
    return total


def best_codes(values: torch.Tensor, levels: torch.Tensor, codebooks: torch.Tensor) -> torch.Tensor:
    """Find the codes of the best paths, uint8 [groups, 32].

    Args:
        values: float32 [groups, 32].
        levels: entries of all codebooks by next state, float32 [codebooks, 2, K].
        codebooks: of the groups, int64 [groups].
    """
    if triton.is_available(values.device):
        return triton.best_codes(values, levels, codebooks)
    chains = values.reshape(-1, CHAIN)
    own = codebooks[:, None].expand(-1, len(chains) // len(values)).reshape(-1)
    parts = zip(chains.split(CHUNK), own.split(CHUNK), strict=True)
    return torch.cat([_chain_codes(part, levels[chosen]) for part, chosen in parts]).view(values.shape)


def _chain_codes(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Find the codes of the best paths, uint8 [chains, 16], of values [chains, 16] and entries [chains, 2, K]."""
    cost, steps = first_cost(values.shape[:1], values.device), []
    for index in range(CHAIN):
        cost, ways = cheapest_ways((values[:, index, None, None] - levels).square(), cost)
        steps.append(ways)
    state, codes = cost.argmin(1, keepdim=True), []
    for ways in reversed(steps):
        state, code = source(ways.gather(1, state), state, levels.shape[2])
        codes.append(code[:, 0].byte())
    return torch.stack(codes[::-1], 1)
