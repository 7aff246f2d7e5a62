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
from d2q_edge.quantize.rtn import round_layer
from d2q_edge.quantize.statistics import InputStatistics
from tests.checkpoints import EXAMPLE
from tests.pipeline.common import CPU, Setup


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
