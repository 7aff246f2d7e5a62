"""The tool that learned the frozen tables, on a training set small enough for a test."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from d2q_edge.formats.codebooks import parse_tables
from d2q_edge.formats.tensor_types import GROUP
from tests.checkpoints import EXAMPLE
from tests.quantize.slow_trellis import nearest_errors
from tools.learn_tables import (
    PAIRS,
    SCALARS,
    TAILS,
    Encoder,
    Recipe,
    canonical,
    format_tables,
    learn,
    main,
    model_blocks,
    synthetic,
    vectors,
)

CPU = torch.device("cpu")
small = pytest.mark.parametrize(
    "recipe", [replace(r, blocks=100, rounds=3, integer_rounds=2) for r in (PAIRS, SCALARS)], ids=["pairs", "scalars"]
)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.slow
@small
def test_learned_table_is_on_the_grid_and_beats_its_start(recipe: Recipe) -> None:
    blocks = synthetic("gaussian", recipe.blocks, generator(), CPU)
    table, loss = learn([(blocks, 1.0)], recipe, generator(), Encoder(CPU))
    assert torch.equal(table, table.round()) and table.min() >= -64 and table.max() <= 63
    _, start = learn([(blocks, 1.0)], replace(recipe, rounds=0, integer_rounds=1), generator(), Encoder(CPU))
    assert loss < 0.95 * start


@small
def test_errors_are_those_of_the_definition(recipe: Recipe) -> None:
    blocks = synthetic("student4", 3, generator(), CPU)
    scale = torch.tensor([0.05, 0.1, 0.2])
    table = torch.randint(-64, 64, (256, recipe.entries, recipe.dimension), generator=generator()).float()
    found = Encoder(CPU).group_errors(blocks, scale, table)
    x = vectors(blocks, recipe.dimension).double().view(3, 8, 1, -1, 1, recipe.dimension)
    if recipe.dimension == 1:
        groups = (blocks / scale[:, None]).double().view(24, 32).numpy()
        errors = np.stack([nearest_errors(group, table[:, :, 0].double().numpy()) for group in groups])
        expected = torch.from_numpy(errors).view(3, 8, 256) * scale.double().square()[:, None, None]
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
        return
    levels = scale.double().view(3, 1, 1, 1, 1, 1) * table.double()[None, None, :, None]
    expected = (x - levels).square().sum(5).amin(4).sum(3)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_pairs_are_half_a_group_apart() -> None:
    row = torch.arange(256.0)[None]
    assert vectors(row, 2)[3, 5].tolist() == [3 * GROUP + 5, 3 * GROUP + 21]
    assert vectors(row, 1)[3, 5].tolist() == [3 * GROUP + 5]


@pytest.mark.parametrize("kind", ["gaussian", *TAILS])
def test_sources_have_unit_variance_and_their_tails(kind: str) -> None:
    blocks = synthetic(kind, 2000, generator(), CPU)
    assert blocks.square().mean().item() == pytest.approx(1, abs=1e-3)
    kurtosis = blocks.pow(4).mean().item()
    assert abs(kurtosis - 3) < 0.1 if kind == "gaussian" else kurtosis > 5


def test_model_blocks_are_rows_of_its_layers() -> None:
    blocks = model_blocks(EXAMPLE, 500, 0, CPU)
    assert blocks.shape == (500, 256)
    assert 0.5 < blocks.square().mean().item() < 2


def test_canonical_order_is_exact_and_refuses_fractions() -> None:
    table = torch.randint(-64, 64, (256, 16, 2), generator=generator()).float()
    shuffled = table[torch.randperm(256, generator=generator())][:, torch.randperm(16, generator=generator())]
    assert torch.equal(canonical(table), canonical(shuffled))
    with pytest.raises(ValueError, match="integer"):
        canonical(table + 0.25)


def test_command_writes_readable_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs, scalars = (replace(recipe, blocks=1, rounds=1, integer_rounds=1) for recipe in (PAIRS, SCALARS))
    output = tmp_path / "codebooks.txt"
    main(["--model", str(EXAMPLE), "--output", str(output)], (pairs, scalars), test_blocks=1)
    text = output.read_text(encoding="ascii")
    tables = parse_tables(text)
    assert format_tables(*tables) == text
    assert np.unique(tables[0]).size > 10
    assert "TABLE_SHA256" in capsys.readouterr().out
