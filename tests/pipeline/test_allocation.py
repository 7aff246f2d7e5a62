"""The knapsack against brute force, and its promises."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2q_edge.pipeline.allocation import Choice, allocate

Items = Sequence[Sequence[Choice]]


def total(items: Items, taken: Sequence[int]) -> tuple[int, float]:
    chosen = [choices[index] for choices, index in zip(items, taken, strict=True)]
    return sum(choice.bits for choice in chosen), sum(choice.cost for choice in chosen)


def brute_force(items: Items, budget: int) -> float:
    """The least cost of all combinations that fit."""
    every = (total(items, taken) for taken in itertools.product(*(range(len(choices)) for choices in items)))
    return min(cost for bits, cost in every if bits <= budget)


def layers(rng: np.random.Generator, count: int, unit: int = 16) -> list[list[Choice]]:
    """Like layers: sizes of a few kinds, three types, costs over orders of magnitude."""
    items = []
    for _ in range(count):
        size, cost = int(rng.choice([1, 2, 3])) * unit, float(rng.lognormal(0, 1))
        items.append([Choice(37 * size, cost), Choice(53 * size, 0.3 * cost), Choice(72 * size, 0.11 * cost)])
    return items


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.8, 1.0])
def test_nearly_the_best(share: float) -> None:
    rng = np.random.default_rng(round(100 * share))
    exact = 0
    for _ in range(20):
        items = layers(rng, 7)
        least, most = (sum(pick(c.bits for c in choices) for choices in items) for pick in (min, max))
        budget = round(least + share * (most - least))
        bits, cost = total(items, allocate(items, budget))
        best = brute_force(items, budget)
        assert bits <= budget
        assert cost <= 1.1 * best
        exact += cost <= best * (1 + 1e-9)
    assert exact >= 15


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=4), min_size=1, max_size=5),
    st.integers(0, 40),
)
def test_any_choices(pairs: list[list[tuple[int, int]]], budget: int) -> None:
    """Arbitrary, even silly choices: bigger and worse, equal, not convex."""
    items = [[Choice(bits, float(cost)) for bits, cost in choices] for choices in pairs]
    least = sum(min(choice.bits for choice in choices) for choices in items)
    if least > budget:
        with pytest.raises(ValueError, match=f"take {least - budget} bits more"):
            allocate(items, budget)
        return
    taken = allocate(items, budget)
    bits, cost = total(items, taken)
    assert bits <= budget
    assert allocate(items, budget) == taken
    # No single change that fits is better.
    for item, choices in enumerate(items):
        for index, choice in enumerate(choices):
            if bits - choices[taken[item]].bits + choice.bits <= budget:
                assert choice.cost >= choices[taken[item]].cost, (item, index)
    if len(items) == 1:
        assert cost == brute_force(items, budget)


def test_by_hand() -> None:
    items = [[Choice(2, 10.0), Choice(3, 4.0), Choice(4, 3.0)], [Choice(2, 5.0), Choice(3, 2.0), Choice(4, 1.5)]]
    assert allocate(items, 4) == [0, 0]
    assert allocate(items, 5) == [1, 0], "6 for a bit is more than 3"
    assert allocate(items, 6) == [1, 1]
    assert allocate(items, 7) == [2, 1], "1 is more than 0.5"
    assert allocate(items, 100) == [2, 2]


def test_a_choice_above_the_hull_can_fill_what_is_left() -> None:
    """The middle choice is no step of the greedy part, but all that fits."""
    items = [[Choice(10, 100.0), Choice(15, 90.0), Choice(20, 1.0)]]
    assert allocate(items, 17) == [1]
    assert allocate(items, 20) == [2]


def test_an_exchange_beats_the_greedy_part() -> None:
    """Best per bit is the first item; but then the second, which gains more, doesn't fit."""
    items = [[Choice(0, 10.0), Choice(3, 4.0)], [Choice(0, 20.0), Choice(5, 11.0)]]
    assert allocate(items, 5) == [0, 1]


def test_equals_prefer_the_first() -> None:
    items = [[Choice(1, 2.0), Choice(2, 1.0)]] * 3
    assert allocate(items, 5) == [1, 1, 0]


@pytest.mark.parametrize("mean", [2.4, 2.625, 3.06, 3.5, 4.2])
def test_budget_of_a_real_model_is_used(mean: float) -> None:
    """The shapes of an 8-block model; less than half a per cent is left, and it is quick."""
    rng = np.random.default_rng(1)
    sizes = [512 * 512, 512 * 256, 512 * 256, 512 * 512, 1536 * 512, 1536 * 512, 1536 * 512] * 8
    items = []
    for size in sizes:
        cost = float(rng.lognormal(0, 1)) * size
        items.append([Choice(size * bits // 16, cost * e) for bits, e in ((37, 1.0), (53, 0.3), (72, 0.11))])
    budget = int(mean * sum(sizes))
    bits, _ = total(items, allocate(items, budget))
    assert 0.995 * budget < bits <= budget


def test_a_step_needs_the_one_before_it() -> None:
    """The second step is small enough for what is left, but begins where the first one ends."""
    items = [[Choice(1, 9.0), Choice(5, 1.0), Choice(6, 0.0)]]
    assert allocate(items, 2) == [0]


def test_exchanges_go_on_while_they_pay() -> None:
    """The same twice: one exchange after the other."""
    items = [[Choice(0, 10.0), Choice(3, 4.0)], [Choice(0, 20.0), Choice(5, 11.0)]] * 2
    assert allocate(items, 10) == [0, 1, 0, 1]
