"""Viterbi's algorithm on chains of 16 weights, against one that carries paths along, and hand-worked cases."""

from itertools import product

import numpy as np
import pytest
import torch

from d2q_edge.formats.codebooks import SCALAR_TABLE
from d2q_edge.formats.tensor_types import D2Q3, table_index
from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.trellis import best_codes, by_next_state, cheapest_ways, path_errors, source
from tests.quantize.slow_trellis import nearest_errors, nearest_path

SEARCH = CodebookSearch(D2Q3)


def groups(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    values = torch.randn(count, 32, generator=generator) * torch.rand(count, 1, generator=generator) * 30
    return values, torch.randint(0, 256, (count,), generator=generator)


def test_entries_by_next_state() -> None:
    """The code's low bit is the next state; those after an even code come first."""
    assert by_next_state(torch.arange(16.0)).tolist() == [[0, 2, 4, 6, 8, 10, 12, 14], [1, 3, 5, 7, 9, 11, 13, 15]]
    for state, way in product((0, 1), range(8)):
        before, code = source(torch.tensor(way), torch.tensor(state), 8)
        assert by_next_state(torch.arange(16))[state, way] == code + 8 * before and code % 2 == state


def test_one_step_by_hand() -> None:
    errors = torch.tensor([[9.0, 4, 9, 9, 1, 9, 9, 9], [9, 9, 9, 2, 9, 9, 9, 0]])
    cost, ways = cheapest_ways(errors, torch.tensor([1.0, 5]))
    assert cost.tolist() == [5, 3]
    assert ways.tolist() == [1, 3]


def test_codes_are_those_of_the_cheapest_path() -> None:
    values, codebooks = groups(40)
    codes = best_codes(values, SEARCH.ways, codebooks)
    assert codes.dtype == torch.uint8
    for group, codebook, found in zip(values.double().numpy(), codebooks.tolist(), codes.tolist(), strict=True):
        table = SCALAR_TABLE[codebook].astype(np.float64)
        assert found == [code for chain in group.reshape(2, 16) for code in nearest_path(chain, table)[0]]


def test_errors_of_several_codebooks() -> None:
    values, _ = groups(9)
    chosen = torch.randint(0, 256, (9, 5), generator=torch.Generator().manual_seed(1))
    found = path_errors(values, SEARCH.ways[chosen])
    for group, codebooks, errors in zip(values.double().numpy(), chosen, found, strict=True):
        expected = nearest_errors(group, SCALAR_TABLE[codebooks].astype(np.float64))
        np.testing.assert_allclose(errors.numpy(), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("count", [1, 70000])
def test_codes_have_the_errors_that_are_reported(count: int) -> None:
    """More chains than are searched at once, too."""
    values, codebooks = groups(count)
    codes = best_codes(values, SEARCH.ways, codebooks)
    chosen = SEARCH.levels[codebooks, :, 0].gather(1, table_index(codes).long())
    errors = path_errors(values, SEARCH.ways[codebooks][:, None])[:, 0]
    torch.testing.assert_close((chosen - values).square().sum(1), errors, rtol=1e-3, atol=1e-2)


def test_a_path_beats_choices_one_by_one() -> None:
    values, codebooks = groups(500)
    codes = best_codes(values, SEARCH.ways, codebooks)
    levels, state = SEARCH.levels[codebooks, :, 0], torch.zeros(500, dtype=torch.long)
    greedy = torch.zeros(500)
    for column in range(32):
        state = torch.zeros_like(state) if column % 16 == 0 else state
        own = levels.unflatten(1, (2, 8))[torch.arange(500), state]
        error, code = (values[:, column, None] - own).square().min(1)
        greedy, state = greedy + error, code % 2
    chosen = levels.gather(1, table_index(codes).long())
    best = (chosen - values).square().sum(1)
    assert bool((best <= greedy * 1.0001).all())
    assert float(best.sum() / greedy.sum()) < 0.99
