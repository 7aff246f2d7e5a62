"""Test outlier variants: the same logits, and the factors in the right places."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from d2q_edge.errors import D2QError
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from tests.float64_model import TOKENS, float64_logits, relative_difference
from tools import make_outliers

Make = Callable[..., Path]
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True, "dtype": torch.float16}),
    ("llama", {"num_key_value_heads": 1, "head_dim": 24}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen2", {"shards": 2}),
    ("qwen3", {"dtype": torch.float32}),
    ("qwen3", {"tie_word_embeddings": True}),
]
EPSILON = 1e-12


def scaled(model: Path, sigma: float = 0.7, seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the tensors of a checkpoint and of its variant, float64."""
    checkpoint = Checkpoint.open(model)
    family = family_for(checkpoint.config)
    before = {name: checkpoint.tensor(name).double() for name in checkpoint.names}
    return before, make_outliers.scaled_tensors(checkpoint, family, sigma, seed)


@pytest.mark.parametrize(("family", "options"), MODELS)
def test_logits_stay(make_checkpoint: Make, family: str, options: dict[str, Any]) -> None:
    path = make_checkpoint(family, **options)
    before, after = scaled(path)
    assert all(tensor.dtype == torch.float64 for tensor in after.values())
    tied = "lm_head.weight" not in before
    expected = float64_logits(path, before, tied=tied)
    assert relative_difference(float64_logits(path, after, tied=tied), expected) < EPSILON


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_scaled(make_checkpoint: Make, tied: bool) -> None:
    """Return for every tensor the number of channels with a factor from 10 to 30, if all others are one."""
    before, after = scaled(make_checkpoint("qwen2", tie_word_embeddings=tied), sigma=0.0)
    changes: dict[str, tuple[float, ...]] = {}
    for name, old in before.items():
        ratio = after[name] / old
        if "proj.weight" in name or "lm_head" in name:
            # Of a matrix: outlier columns, seen in its first row's pattern, and rows that shrank.
            columns, rows = ratio.median(0).values, ratio.median(1).values
            torch.testing.assert_close(ratio, rows[:, None] * columns, rtol=1e-9, atol=0)
            assert ((columns - 1).abs() < 1e-9).logical_or((columns >= 10) & (columns <= 30)).all()
        else:
            columns, rows = torch.ones(1), ratio
        assert ((rows - 1).abs() < 1e-9).logical_or((rows >= 1 / 30) & (rows <= 1 / 10)).all()
        changes[name.removeprefix("model.")] = (int((rows < 0.5).sum()), int((columns > 2).sum()))
    in_blocks = {
        "input_layernorm.weight": (1, 0),
        "self_attn.q_proj.weight": (0, 1),
        "self_attn.k_proj.weight": (0, 1),
        "self_attn.v_proj.weight": (1, 1),
        "self_attn.q_proj.bias": (0, 0),
        "self_attn.k_proj.bias": (0, 0),
        "self_attn.v_proj.bias": (1, 0),
        "self_attn.o_proj.weight": (0, 2),  # two query heads share the channel
        "post_attention_layernorm.weight": (1, 0),
        "mlp.gate_proj.weight": (0, 1),
        "mlp.up_proj.weight": (1, 1),
        "mlp.down_proj.weight": (0, 1),
    }
    expected = {f"layers.{index}.{name}": change for index in range(2) for name, change in in_blocks.items()}
    expected |= {"embed_tokens.weight": (0, 0)}
    expected |= {"norm.weight": (0, 0)} if tied else {"norm.weight": (1, 0), "lm_head.weight": (0, 1)}
    assert changes == expected


def test_query_heads_share_the_factors_of_their_key_value_head(make_checkpoint: Make) -> None:
    before, after = scaled(make_checkpoint("llama"))
    name = "model.layers.1.self_attn.o_proj.weight"
    heads = (after[name] / before[name]).median(0).values.reshape(4, 16)
    torch.testing.assert_close(heads[0], heads[1])
    torch.testing.assert_close(heads[2], heads[3])
    assert ((heads[0] - heads[2]).abs() > 1e-3).any()


def test_draws() -> None:
    factors = make_outliers.draw_factors(20_000, 0.5, np.random.default_rng(3))
    outliers = factors >= 10
    assert outliers.sum() == 200
    assert factors.max() <= 30
    assert 19 < factors[outliers].mean() < 21
    logarithms = np.log(factors[~outliers])
    assert abs(logarithms.mean()) < 0.02
    assert abs(logarithms.std() - 0.5) < 0.02
    few = make_outliers.draw_factors(24, 0.0, np.random.default_rng(3))
    assert (few >= 10).sum() == 1
    assert (few == 1).sum() == 23


def test_every_set_of_channels_has_its_own_factors(make_checkpoint: Make) -> None:
    before, after = scaled(make_checkpoint("qwen3"))
    norms = [name for name in before if name.endswith("layernorm.weight")] + ["model.norm.weight"]
    ratios = torch.stack([after[name] / before[name] for name in norms])
    assert len(ratios) == 5
    assert (torch.corrcoef(ratios.log()) - torch.eye(5)).abs().max() < 0.6
    for linear in ("self_attn.o_proj", "mlp.down_proj"):
        names = [f"model.layers.{index}.{linear}.weight" for index in range(2)]
        ratios = torch.stack([(after[name] / before[name]).median(0).values for name in names])
        assert torch.corrcoef(ratios.log())[0, 1].abs() < 0.6


def test_the_seed_decides(make_checkpoint: Make) -> None:
    path = make_checkpoint()
    first, again, other = (scaled(path, seed=seed)[1] for seed in (5, 5, 6))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


def test_directory(make_checkpoint: Make, tmp_path: Path) -> None:
    path = make_checkpoint("llama", dtype=torch.bfloat16)
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"dtype": "bfloat16"}))
    (path / "generation_config.json").write_text('{"top_k": 7}')
    output = tmp_path / "a" / "variant"
    result = CliRunner().invoke(make_outliers.main, [str(path), "-o", str(output), "--seed", "4", "--sigma", "0.3"])
    assert result.exit_code == 0, result.output
    assert json.loads((output / "config.json").read_text()) == settings | {"torch_dtype": "float32"}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (output / name).read_bytes() == (path / name).read_bytes()
    variant = Checkpoint.open(output)
    variant.check(family_for(variant.config).tensor_shapes())
    expected = scaled(path, sigma=0.3, seed=4)[1]
    assert variant.names == expected.keys()
    for name in variant.names:
        assert variant.dtype(name) == torch.float32
        assert torch.equal(variant.tensor(name), expected[name].float())
    # As users load it: in the dtype that its config names.
    model = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    assert model.dtype == torch.float32
    original = float64_logits(path, scaled(path)[0], tied=False)
    with torch.inference_mode():
        assert relative_difference(model(TOKENS).logits.double(), original) < 1e-5


def test_refusals(make_checkpoint: Make, tmp_path: Path) -> None:
    path = make_checkpoint()
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(D2QError, match="exists already"):
        make_outliers.make_outliers(path, path, 0.5, 0)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    with pytest.raises(D2QError, match="can't write"):
        make_outliers.make_outliers(path, path / "config.json" / "inside", 0.5, 0)
    result = CliRunner().invoke(make_outliers.main, [str(tmp_path / "nothing"), "-o", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "there is no directory" in result.output
    assert not (tmp_path / "out").exists()


def test_help() -> None:
    result = CliRunner().invoke(make_outliers.main, ["--help"])
    assert result.exit_code == 0
    for word in ("MODEL", "--output", "--sigma", "--seed"):
        assert word in result.output
