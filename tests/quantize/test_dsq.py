"""Column scales: against a numeric minimization and float64 inverses, and that no logit of a model changes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from d2q_edge.model.blocks import BlockRunner
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import Family, family_for
from d2q_edge.quantize.dsq import InputEnergy, absorb, column_scales, weight_energy
from tests.float64_model import TOKENS, float64_logits, relative_difference

Make = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("qwen2", {"num_key_value_heads": 1}),
    ("qwen2", {"hidden_size": 96, "tie_word_embeddings": True}),
    ("qwen3", {}),
    ("qwen3", {"num_attention_heads": 6, "tie_word_embeddings": True}),
]


def energies(columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and input energies over four orders of magnitude."""
    generator = torch.Generator().manual_seed(columns)
    first, second = torch.exp(2 * torch.randn(2, columns, generator=generator))
    return first, second


class TestScales:
    def test_by_hand(self) -> None:
        # (w / h) ** (1/4) is 2, 1/2, 1; their geometric mean is 1.
        scales = column_scales(torch.tensor([16.0, 1.0, 3.0]), torch.tensor([1.0, 16.0, 3.0]))
        torch.testing.assert_close(scales, torch.tensor([2.0, 0.5, 1.0]))
        # 4 and 1 less their geometric mean.
        scales = column_scales(torch.tensor([256.0, 1.0]), torch.tensor([1.0, 1.0]))
        torch.testing.assert_close(scales, torch.tensor([2.0, 0.5]))

    def test_rows_are_pooled_by_hand(self) -> None:
        # Columns 0 and 2 are of row 1, w 64 + 17 and h 1; column 1 is of row 0, w 1 and h 81: c is 3 and 1/3, and the
        # geometric mean is over columns.
        weights, inputs = torch.tensor([64.0, 1.0, 17.0]), torch.tensor([0.25, 81.0, 0.75])
        scales = column_scales(weights, inputs, torch.tensor([1, 0, 1]))
        mean = (3 * 3 / 3) ** (1 / 3)
        torch.testing.assert_close(scales, torch.tensor([3.0, 1 / 3, 3.0]) / mean)

    @pytest.mark.parametrize(("balance", "expected"), [(1, [4.0, 0.25]), (0, [0.125, 8.0]), (0.5, [0.5**0.5, 2**0.5])])
    def test_balance(self, balance: float, expected: list[float]) -> None:
        scales = column_scales(torch.tensor([16.0, 1 / 16]), torch.tensor([64.0, 1 / 64]), balance=balance)
        torch.testing.assert_close(scales, torch.tensor(expected))

    @pytest.mark.parametrize("rows", [None, torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5])], ids=["own", "pooled"])
    def test_minimises_the_objective(self, rows: torch.Tensor | None) -> None:
        """L-BFGS in float64, from ones, finds no better scales and, but for a common factor, no others."""
        weights, inputs = energies(12)
        index = torch.arange(12) if rows is None else rows
        logs = torch.zeros(int(index.max()) + 1, dtype=torch.float64, requires_grad=True)

        def objective(squares: torch.Tensor) -> torch.Tensor:
            return (inputs.double() * squares).sum() * (weights.double() / squares).sum()

        optimizer = torch.optim.LBFGS([logs], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def step() -> float:
            optimizer.zero_grad()
            loss = objective((2 * logs[index]).exp()).log()
            loss.backward()
            return loss.item()

        optimizer.step(step)
        found = column_scales(weights, inputs, rows).double()
        best = logs.detach()[index].exp()
        assert float(objective(found.square())) <= float(objective(best.square())) * (1 + 1e-6)
        torch.testing.assert_close(found, best / best.log().mean().exp(), rtol=1e-4, atol=0)
        assert float(objective(found.square())) < 0.7 * float(objective(torch.ones(12, dtype=torch.float64)))

    @pytest.mark.parametrize("balance", [0, 0.3, 0.5, 1])
    def test_outlier_channels_do_not_matter(self, balance: float) -> None:
        """A channel larger in the weights and smaller in the input has a larger scale, and W / c is what it was."""
        generator = torch.Generator().manual_seed(0)
        weight, x = torch.randn(20, 16, generator=generator), torch.randn(200, 16, generator=generator)
        factors = torch.exp(2 * torch.randn(16, generator=generator))

        def scales(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            layer = nn.Linear(16, 20)
            layer.weight = nn.Parameter(weight)
            return column_scales(weight_energy([layer]), conditional_energy([x]), balance=balance)

        plain, changed = scales(weight, x), scales(weight * factors, x / factors)
        normalised = factors / factors.log().mean().exp()
        torch.testing.assert_close(changed, plain * normalised, rtol=1e-4, atol=0)
        ratio = ((weight * factors / changed) / (weight / plain)).detach()
        torch.testing.assert_close(ratio, torch.full_like(ratio, float(ratio[0, 0])), rtol=1e-4, atol=0)

    def test_dead_columns(self) -> None:
        weights, inputs = torch.tensor([256.0, 1.0, 0.0, 7.0]), torch.tensor([1.0, 1.0, 5.0, 0.0])
        torch.testing.assert_close(column_scales(weights, inputs), torch.tensor([2.0, 0.5, 1.0, 1.0]))
        assert column_scales(torch.zeros(3), inputs[:3]).tolist() == [1.0, 1.0, 1.0]

    def test_range(self) -> None:
        weights = torch.tensor([1e30, 1e-30, *[1.0] * 6])
        scales = column_scales(weights, torch.ones(8))
        torch.testing.assert_close(scales, torch.tensor([1e4, 1e-4, *[1.0] * 6]), rtol=1e-4, atol=0)


def conditional_energy(batches: Sequence[torch.Tensor]) -> torch.Tensor:
    energy = InputEnergy(batches[0].shape[-1])
    for batch in batches:
        energy.add_batch(batch)
    return energy.conditional()


class TestEnergies:
    def test_conditional_energy(self) -> None:
        generator = torch.Generator().manual_seed(1)
        mix = torch.randn(24, 24, generator=generator)
        x = torch.randn(3, 40, 24, generator=generator) @ mix * torch.exp(3 * torch.randn(24, generator=generator))
        dead = torch.tensor([0, 7, 23])
        x[:, :, dead] = 0
        found = conditional_energy([x[:1], x[1:]])
        assert found.dtype == torch.float32
        assert found[dead].tolist() == [0.0, 0.0, 0.0]
        live = np.setdiff1d(np.arange(24), dead)
        flat = x.double().numpy().reshape(-1, 24)[:, live]
        gram = flat.T @ flat / 120
        damped = gram + 0.01 * np.diag(gram.diagonal())
        expected = 1 / np.linalg.inv(damped).diagonal()
        np.testing.assert_allclose(found.numpy()[live], expected, rtol=1e-3)
        # What the others explain is much.
        assert (expected < 0.5 * gram.diagonal()).any()

    @pytest.mark.slow
    def test_accelerators_compute_the_same(self, request: pytest.FixtureRequest) -> None:
        """By matrix products, where a GPU's solver would be slow."""
        x = torch.randn(3000, 1100, generator=torch.Generator().manual_seed(1))
        expected = conditional_energy([x])
        request.getfixturevalue("accelerated")
        found = conditional_energy([x])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
        assert not torch.equal(found, expected)

    def test_fewer_tokens_than_columns(self) -> None:
        energy = conditional_energy([torch.randn(5, 64, generator=torch.Generator().manual_seed(0))])
        assert bool((energy > 0).all())

    def test_weight_energy(self) -> None:
        layers = [nn.Linear(3, 2), nn.Linear(3, 5)]
        expected = [sum(float(row[j]) ** 2 for layer in layers for row in layer.weight.data) for j in range(3)]
        torch.testing.assert_close(weight_energy(layers).data, torch.tensor(expected))


class TestAbsorb:
    @pytest.mark.parametrize("computed", [False, True], ids=["random", "computed"])
    @pytest.mark.parametrize(("family", "options"), MODELS)
    def test_no_logit_changes(
        self, make_checkpoint: Make, family: str, options: dict[str, Any], computed: bool
    ) -> None:
        path = make_checkpoint(family, dtype=torch.float32, **options)
        checkpoint = Checkpoint.open(path)
        bound = family_for(checkpoint.config)
        tensors = {name: checkpoint.tensor(name).double() for name in checkpoint.names}
        expected = float64_logits(path, tensors, tied=bound.tied_embeddings)
        scales = computed_scales(checkpoint, bound) if computed else random_scales(bound)
        changed = dict(tensors)
        for index in range(bound.num_layers):
            for group in bound.block_groups(index):
                absorber = group.norm or group.absorber
                assert absorber is not None
                rows = torch.from_numpy(bound.absorber_rows(index, group.absorber)) if group.absorber else None
                prefix = bound.block_prefix(index)
                absorb_into(changed, [prefix + name for name in group.linears], prefix + absorber, scales, rows)
        if not bound.tied_embeddings:
            absorb_into(changed, [bound.head], bound.final_norm, scales, None)
        assert relative_difference(float64_logits(path, changed, tied=bound.tied_embeddings), expected) < 1e-9
        for name, before in tensors.items():
            # But for those of the residual stream and of q and k, every tensor is another one.
            same = name.endswith(("embed_tokens.weight", "q_norm.weight", "k_norm.weight", "bias")) or (
                name == "model.norm.weight" and bound.tied_embeddings
            )
            same &= not name.endswith(("v_proj.bias", "up_proj.bias"))
            assert torch.equal(changed[name], before) == same, name

    def test_bias_of_a_norm(self) -> None:
        norm, layer = nn.LayerNorm(2), nn.Linear(2, 1)
        norm.bias = nn.Parameter(torch.tensor([3.0, 5.0]))
        layer.weight = nn.Parameter(torch.tensor([[7.0, 9.0]]))
        absorb([layer], norm, torch.tensor([2.0, 4.0]))
        assert norm.weight.tolist() == [2.0, 4.0]
        assert norm.bias.tolist() == [6.0, 20.0]
        assert layer.weight.tolist() == [[3.5, 2.25]]
        assert not layer.weight.requires_grad


Scales = Callable[[str, int, torch.Tensor | None], torch.Tensor]


def random_scales(family: Family) -> Scales:
    generator = torch.Generator().manual_seed(5)

    def scales(first: str, columns: int, rows: torch.Tensor | None) -> torch.Tensor:
        values = torch.exp(torch.randn(columns, generator=generator, dtype=torch.float64))
        return values if rows is None else values[rows]

    return scales


def computed_scales(checkpoint: Checkpoint, family: Family) -> Scales:
    """Those of the original model's own inputs, in float32, by the linear group's first layer."""
    runner = BlockRunner(checkpoint, family, torch.device("cpu"))
    found = {}
    hidden = runner.embed(TOKENS)
    for index in range(family.num_layers):
        block, prefix = runner.load(index), family.block_prefix(index)
        seen, hidden = runner.trace(block, tuple(group.linears[0] for group in family.block_groups(index)), hidden)
        for group in family.block_groups(index):
            rows = torch.from_numpy(family.absorber_rows(index, group.absorber)) if group.absorber else None
            energy = weight_energy([block.get_submodule(name) for name in group.linears])
            found[prefix + group.linears[0]] = column_scales(energy, conditional_energy([seen[group.linears[0]]]), rows)
    if not family.tied_embeddings:
        head = checkpoint.tensor(f"{family.head}.weight").square().sum(0)
        found[family.head] = column_scales(head, conditional_energy([runner.final_norm()(hidden)]))
    return lambda first, _columns, _rows: found[first].double()


def absorb_into(tensors: Tensors, linears: list[str], absorber: str, scales: Scales, rows: torch.Tensor | None) -> None:
    """Run absorb on these tensors, in place."""
    modules = {}
    for name in (*linears, absorber):
        modules[name] = nn.Module()
        for parameter in ("weight", "bias"):
            if f"{name}.{parameter}" in tensors:
                setattr(modules[name], parameter, nn.Parameter(tensors[f"{name}.{parameter}"]))
    columns = tensors[f"{linears[0]}.weight"].shape[1]
    absorb([modules[name] for name in linears], modules[absorber], scales(linears[0], columns, rows), rows)
    for name, module in modules.items():
        tensors |= {f"{name}.{parameter}": value.data for parameter, value in module.named_parameters()}
