"""Solving linear groups: error feedback beats rounding, and the reported errors are those of the outputs."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from d2q_edge.calibration.text import PROSE
from d2q_edge.distributed.process_group import SINGLE_PROCESS
from d2q_edge.formats import tensor_types
from d2q_edge.pipeline.solver import GroupSolver
from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.gptaq import layer_feedback
from d2q_edge.quantize.output_hessian import OutputHessian
from d2q_edge.quantize.rtn import round_layer
from d2q_edge.quantize.statistics import InputStatistics
from tests.checkpoints import EXAMPLE
from tests.pipeline.common import CPU, Setup
from tests.quantize.test_row_feedback import gradients


@pytest.mark.slow
@torch.inference_mode()
def test_feedback_beats_rounding_on_the_example() -> None:
    setup = Setup(EXAMPLE)
    runner = setup.runner()
    text = PROSE.read_text("utf-8")
    tokens = torch.tensor(AutoTokenizer.from_pretrained(EXAMPLE)(text[:20000])["input_ids"][:4096]).view(-1, 512)
    block = runner.load(0)
    first = {group.linears[0]: group for group in setup.family.block_groups(0)}
    seen, _ = runner.trace(block, tuple(first), runner.embed(tokens))
    search, solver = CodebookSearch(tensor_types.D2Q2), GroupSolver(CPU, 0.5, 0, SINGLE_PROCESS)
    for name, group in first.items():
        statistics = InputStatistics(seen[name].shape[1])
        statistics.add_batch(seen[name], seen[name])
        weights = {layer: block.get_submodule(layer).get_parameter("weight") for layer in group.linears}
        solved = solver.solve(weights, dict.fromkeys(weights, "d2q2"), statistics)
        assert list(solved.weights) == list(solved.metrics.layer_errors) == list(group.linears)
        for layer, weight in weights.items():

            def error(quantized: torch.Tensor, x: torch.Tensor = seen[name], weight: torch.Tensor = weight) -> float:
                y = x @ weight.T
                return float((x @ quantized.T - y).square().sum() / y.square().sum())

            found = error(solved.weights[layer].take_values(CPU))
            assert found < 0.8 * error(round_layer(weight, search).weights), layer
            assert solved.metrics.layer_errors[layer] == pytest.approx(found, rel=1e-3)


@torch.inference_mode()
def test_layers_of_different_types() -> None:
    """Each as if it were alone; a layer of a stock type keeps its values."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(8, 256, generator=generator) for name in ("q", "k", "v", "w")}
    statistics = InputStatistics(256)
    inputs = torch.randn(500, 256, generator=generator)
    statistics.add_batch(inputs, inputs + 0.1 * torch.randn(500, 256, generator=generator))
    types = {"q": "d2q2", "k": "d2q3", "v": "d2q2", "w": "f16"}
    solver = GroupSolver(CPU, 0.5, 1, SINGLE_PROCESS)
    found = solver.solve(weights, types, statistics)
    assert set(found.weights) == set(found.metrics.layer_errors) == {"q", "k", "v"}
    assert list(found.floats) == ["w.weight"]
    np.testing.assert_array_equal(found.floats["w.weight"], weights["w"])
    for name in found.weights:
        alone = solver.solve({name: weights[name]}, types, statistics)
        assert found.weights[name].type.name == types[name]
        assert np.array_equal(found.weights[name].data, alone.weights[name].data)
        values = tensor_types.dequantize(found.weights[name].type, found.weights[name].data)
        np.testing.assert_array_equal(found.weights[name].take_values(CPU), values)
        assert found.metrics.layer_errors[name] == pytest.approx(alone.metrics.layer_errors[name], rel=1e-5)
    assert found.metrics.layer_errors["k"] < 0.6 * found.metrics.layer_errors["q"]


class TestRowsTogether:
    """Layers of 96 and 32 rows whose errors count together."""

    @pytest.fixture
    def problem(self) -> tuple[dict[str, torch.Tensor], InputStatistics]:
        generator = torch.Generator().manual_seed(0)
        mix = torch.randn(256, 256, generator=generator)
        inputs = torch.randn(1000, 256, generator=generator) @ mix
        statistics = InputStatistics(256)
        statistics.add_batch(inputs, inputs + 0.1 * torch.randn(1000, 256, generator=generator) @ mix)
        weights = {name: torch.randn(rows, 256, generator=generator) for name, rows in (("q", 96), ("k", 32))}
        return weights, statistics

    @torch.inference_mode()
    def test_less_loss(self, problem: tuple[dict[str, torch.Tensor], InputStatistics]) -> None:
        """tr(G E H E^T) of all rows falls by a seventh, in the layer's own order of rows."""
        weights, statistics = problem
        values = gradients(4000, 128)
        G = values.T @ values
        feedback = layer_feedback(statistics, tensor_types.D2Q2, 0.5)
        target = feedback.target(torch.cat(list(weights.values())))
        losses = []
        for hessian in (None, OutputHessian([G])):
            solved = GroupSolver(CPU, 0.5, 2, SINGLE_PROCESS).solve(
                weights, dict.fromkeys(weights, "d2q2"), statistics, hessian
            )
            found = torch.cat([solved.weights[name].take_values(CPU) for name in weights])
            error = (found - target).double()
            losses.append(float((G.double() * (error @ statistics.hessian.double() @ error.T)).sum()))
        assert losses[1] < 0.86 * losses[0]

    @torch.inference_mode()
    def test_rows_that_do_not_meet(self, problem: tuple[dict[str, torch.Tensor], InputStatistics]) -> None:
        """With a diagonal G every row is as without one; of two types, each has its own rows of G."""
        weights, statistics = problem
        solver = GroupSolver(CPU, 0.5, 1, SINGLE_PROCESS)
        plain = OutputHessian([torch.rand(128).diag()])
        joined = torch.rand(128).diag()
        joined[:96, 96:] = joined[96:, :96] = 0.01
        for types in (dict.fromkeys(weights, "d2q2"), {"q": "d2q2", "k": "d2q3"}):
            expected = solver.solve(weights, types, statistics)
            # Of different types, rows of q and k don't wait for each other.
            for hessian in (plain, OutputHessian([joined])) if types["k"] == "d2q3" else (plain,):
                found = solver.solve(weights, types, statistics, hessian)
                for name, weight in expected.weights.items():
                    assert np.array_equal(found.weights[name].data, weight.data)
                    errors = found.metrics.layer_errors[name], expected.metrics.layer_errors[name]
                    assert errors[0] == pytest.approx(errors[1], rel=1e-5)
