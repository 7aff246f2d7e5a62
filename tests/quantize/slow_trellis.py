"""Viterbi's algorithm from its definition, one path at a time, with whatever a path carries along."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
Carried = TypeVar("Carried")


def best_path(
    start: Carried,
    columns: Iterable[int],
    levels: F64,
    cost: Callable[[Carried, int, float], float],
    follow: Callable[[Carried, int, float], Carried],
) -> tuple[list[int], Carried]:
    """Return the codes of the cheapest path through a chain, and what it carries in the end.

    Args:
        start: what is carried before the first column.
        columns: of the chain.
        levels: [16], the entries after an even code, then those after an odd one.
        cost: of choosing an entry for a column.
        follow: what is carried after that.
    """
    survivors: dict[int, tuple[float, list[int], Carried]] = {0: (0.0, [], start)}
    for column in columns:
        best: dict[int, tuple[float, int, int]] = {}
        for state, (before, _, carried) in survivors.items():
            for code in range(8):
                total = before + cost(carried, column, float(levels[code + 8 * state]))
                if code % 2 not in best or total < best[code % 2][0]:
                    best[code % 2] = total, state, code
        survivors = {
            after: (total, [*survivors[state][1], code], follow(survivors[state][2], column, levels[code + 8 * state]))
            for after, (total, state, code) in best.items()
        }
    _, codes, carried = min(survivors.values(), key=lambda survivor: survivor[0])
    return codes, carried


def nearest_path(values: F64, levels: F64) -> tuple[list[int], list[float]]:
    """Return the codes and entries nearest to the values [16] of a chain."""

    def cost(_chosen: list[float], column: int, entry: float) -> float:
        return float((values[column] - entry) ** 2)

    return best_path([], range(16), levels, cost, lambda chosen, _column, entry: [*chosen, float(entry)])


def nearest_errors(values: F64, levels: F64) -> F64:
    """Return the squared errors [codebooks] of the nearest paths of a group [32] in all codebooks [codebooks, 16]."""
    total = np.zeros(len(levels))
    for chain in values.reshape(2, 16):
        even, odd = np.zeros(len(levels)), np.full(len(levels), np.inf)
        for value in chain:
            after_even, after_odd = np.square(value - levels[:, :8]).T, np.square(value - levels[:, 8:]).T
            ways = np.concatenate([even + after_even, odd + after_odd])
            even, odd = ways[0::2].min(0), ways[1::2].min(0)
        total += np.minimum(even, odd)
    return total
