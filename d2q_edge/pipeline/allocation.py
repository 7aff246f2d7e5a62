"""Spread a budget of bits over tensors: the multiple-choice knapsack problem, solved along its convex hull.

Of each item only the choices on the lower convex hull of (bits, cost) are steps that can pay: from one to the next, the
gain per bit falls. Taking the best step of all items again and again is optimal as long as the budget lasts (Sinha and
Zoltners, 1979); the rest is filled with smaller steps, and then with exchanges between two items as long as one pays.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Choice:
    """One way to store an item: its bits, and its cost in any unit that can be added up."""

    bits: int
    cost: float


def allocate(items: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    """Choose for every item so that the sum of costs is small and the sum of bits is at most `budget`.

    Args:
        items: the choices of each, at least one, in any order.
        budget: bits.

    Returns:
        The index of the choice of each item. The same input gives the same output; among equals the first item, and of
        its choices the first, is preferred.

    Raises:
        ValueError: even the smallest choices exceed the budget.
    """
    hulls = [_hull(choices) for choices in items]
    taken = [hull[0] for hull in hulls]
    left = budget - sum(choices[index].bits for choices, index in zip(items, taken, strict=True))
    if left < 0:
        raise ValueError(f"the smallest choices take {-left} bits more than the budget of {budget}")
    steps = []
    for item, hull in enumerate(hulls):
        for before, after in pairwise(hull):
            a, b = items[item][before], items[item][after]
            steps.append(((b.cost - a.cost) / (b.bits - a.bits), item, before, after, b.bits - a.bits))
    # Within an item the gain per bit falls, so that its steps stay in order.
    for _, item, before, after, bits in sorted(steps):
        if bits <= left and taken[item] == before:
            taken[item] = after
            left -= bits
    while (better := _best_exchange(items, taken, left)) is not None:
        for item, choice in better:
            left += items[item][taken[item]].bits - items[item][choice].bits
            taken[item] = choice
    return taken


def _hull(choices: Sequence[Choice]) -> list[int]:
    """Return the indices of the choices on the lower convex hull, in ascending order of bits."""
    hull: list[int] = []
    for index in sorted(range(len(choices)), key=lambda i: (choices[i].bits, choices[i].cost)):
        new = choices[index]
        if hull and new.cost >= choices[hull[-1]].cost:
            continue
        while len(hull) > 1:
            a, b = choices[hull[-2]], choices[hull[-1]]
            if (b.cost - a.cost) * (new.bits - b.bits) < (new.cost - b.cost) * (b.bits - a.bits):
                break
            hull.pop()
        hull.append(index)
    return hull


def _best_exchange(items: Sequence[Sequence[Choice]], taken: Sequence[int], left: int) -> list[tuple[int, int]] | None:
    """Return the change of one or two items' choices that fits and gains most, if any gains something."""
    moves = []
    for item, choices in enumerate(items):
        now = choices[taken[item]]
        for index, choice in enumerate(choices):
            if index != taken[item]:
                moves.append((choice.bits - now.bits, now.cost - choice.cost, item, index))
    best: list[tuple[int, int]] | None = None
    most = 1e-12 * sum(abs(choices[index].cost) for choices, index in zip(items, taken, strict=True))
    upward = sorted((move for move in moves if move[1] > 0), key=lambda move: -move[1])
    for bits, gain, item, index in upward:
        if bits <= left and gain > most:
            most, best = gain, [(item, index)]
    for saved, loss, other, back in (move for move in moves if move[0] < 0):
        for bits, gain, item, index in upward:
            if gain + loss <= most:
                break
            if item != other and bits + saved <= left:
                most, best = gain + loss, [(item, index), (other, back)]
    return best
