"""Tuning one block: its loss by hand, what comes out, where its inputs are kept, resuming, experts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2q_edge.calibration.hidden_states import StreamPair
from d2q_edge.distributed.process_group import SINGLE_PROCESS
from d2q_edge.formats import tensor_types
from d2q_edge.formats.quantized_block import QuantizedBlock
from d2q_edge.options import Options
from d2q_edge.pipeline import block_refinement
from d2q_edge.pipeline.block_refinement import _OutputError, refine_block
from d2q_edge.pipeline.context import Context
from d2q_edge.pipeline.memory import MemoryPlan
from d2q_edge.pipeline.report import Report
from d2q_edge.pipeline.tunable_block import TunableBlock
from d2q_edge.pipeline.work_dir import WorkDir
from d2q_edge.quantize.codebook_search import Searches
from d2q_edge.quantize.refine import Schedule
from tests.pipeline.common import CPU, SMALL, WINDOWS, Make, Setup, StoppedAt, block_files

LARGE_STEPS = Schedule(passes=4, batch=2, scale_rate=3e-3, code_rate=0.7)


@pytest.fixture(autouse=True)
def large_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let codes change in a few steps."""
    monkeypatch.setattr(block_refinement, "SCHEDULE", LARGE_STEPS)


class Weights:
    """Guidance that weights the tokens of a batch by their place."""

    def weights(self, prefix: str, modules: tuple[str, ...]) -> dict[int, torch.Tensor]:
        assert (prefix, modules) == ("model.layers.1.", ("mlp.down_proj",))
        return {batch: torch.linspace(0.5, 1.5, size) for batch, size in enumerate((80, 80, 80, 80, 80, 80))}


class BeforeBlock:
    """The second block of a model, quantized, and the hidden states around it."""

    def __init__(self, setup: Setup, work: WorkDir, guidance: Any = None) -> None:
        self.runner = setup.runner()
        self.streams = StreamPair(self.runner, WINDOWS, 80, CPU, SINGLE_PROCESS, torch.float32)
        self.context = Context(self.runner, self.streams, SINGLE_PROCESS, Report(CPU), guidance)
        first = self.runner.load(0)
        self.streams.advance(0, first, self.applied(first, work.read_block(0)))
        self.result, self.original = work.read_block(1), self.runner.load(1)
        self.inputs = self.streams.quantized.copy()
        self.streams.advance(1, self.original, self.applied(self.original, self.result))

    def applied(self, original: torch.nn.Module, result: QuantizedBlock) -> torch.nn.Module:
        quantized = self.runner.share(original)
        result.apply(quantized)
        return quantized

    def error(self, result: QuantizedBlock, windows: slice, weights: Any = 1.0) -> float:
        """The relative squared error in float64."""
        block = self.applied(self.original, result)
        off, all_of_it = [], []
        for batch in range(len(self.streams)):
            target = self.streams.original[batch].double()
            output = self.runner.forward(block, self.inputs[batch]).double()
            off.append((output - target).square().mean(-1) * weights)
            all_of_it.append(target.square().mean(-1) * weights)
        return float(torch.cat(off)[windows].mean() / torch.cat(all_of_it).mean())


@pytest.fixture
def finished(make_checkpoint: Make, tmp_path: Path) -> tuple[Setup, WorkDir]:
    """Without column scales, so that a block can be loaded as it was quantized."""
    setup = Setup(make_checkpoint(**SMALL))
    work = WorkDir(tmp_path / "finished", {})
    with torch.inference_mode():
        # Random weights, which good rounding leaves little to tune of.
        options = Options(guidance=False, dsq=False, descent_rounds=0, alpha=0)
        setup.run(work, options, dtype=torch.float32, batch_tokens=80)
    return setup, work


@pytest.mark.parametrize("weighted", [False, True])
@torch.inference_mode()
def test_the_error_falls(finished: tuple[Setup, WorkDir], weighted: bool) -> None:
    """That of the window that isn't tuned on, as the metrics have it; and the streams go on with the tuned block."""
    at = BeforeBlock(*finished, Weights() if weighted else None)
    weights = torch.linspace(0.5, 1.5, 80, dtype=torch.float64).view(2, 40) if weighted else 1.0
    held = slice(11, 12)
    before = at.error(at.result, held, weights)
    tuned, module = refine_block(at.context, 1, at.inputs.copy(), at.original, at.result, schedule=LARGE_STEPS)
    assert tuned.metrics.output_errors == pytest.approx([before, at.error(tuned, held, weights)], rel=1e-3)
    assert tuned.metrics.output_errors[1] < before
    assert at.error(tuned, slice(0, 11), weights) < 0.99 * at.error(at.result, slice(0, 11), weights)
    for batch in range(len(at.streams)):
        expected = at.runner.forward(module, at.inputs[batch])
        torch.testing.assert_close(at.streams.quantized[batch], expected, rtol=1e-4, atol=1e-4)
    assert tuned.norm_biases.keys() == {"input_layernorm", "post_attention_layernorm"}
    changed = 0
    for layer, weight in tuned.weights.items():
        before_it = at.result.weights[layer]
        codes, old = (tensor_types.unpack(each.type, each.data)[2] for each in (weight, before_it))
        changed += int((codes != old).sum())
    assert changed > 20


def test_gradients(finished: tuple[Setup, WorkDir]) -> None:
    """Those of a batch against differences of the loss that is reported."""
    at = BeforeBlock(*finished, Weights())
    block = TunableBlock(at.runner, 1, at.runner.share(at.original), at.result, Searches(CPU))
    objective, items = _OutputError(at.context, 1, at.inputs, block), [3, 10, 4]
    for layer in block.layers().values():
        for parameter in layer.parameters():
            parameter.grad = torch.zeros_like(parameter)
    objective.prepare([0, 1, 2])
    objective.prepare(items)
    objective.backward()
    for name, own in (("mlp.up_proj", "log_scales"), ("post_attention_layernorm", "gain")):
        layer = block.layers()[name]
        gradient, value = dict(layer.gradients())[own].flatten(), layer.tuned()[own].view(-1)
        place = int(gradient.abs().argmax())
        losses = []
        for step in (1e-2, -2e-2):
            value[place] += step
            layer.refresh()
            losses.append(objective.loss(items) / 3)
        value[place] += 1e-2
        assert float(gradient[place]) == pytest.approx((losses[0] - losses[1]) / 2e-2, rel=2e-2)


def test_in_the_loop(make_checkpoint: Make, tmp_path: Path) -> None:
    """Blocks that are tuned on the way, wherever hidden states are kept, in a run that was interrupted, too."""
    setup = Setup(make_checkpoint(**SMALL))
    plain, tuned = WorkDir(tmp_path / "plain", {}), WorkDir(tmp_path / "tuned", {})
    setup.run(plain)
    report = setup.run(tuned, refine_blocks=True, batch_tokens=80)
    assert "refinement" in report.seconds
    for index in range(3):
        before, after = tuned.read_block(index).metrics.output_errors
        assert after <= before
        assert plain.read_block(index).metrics.output_errors == []
    on_disk = WorkDir(tmp_path / "disk", {})
    (tmp_path / "place").mkdir()
    memory = MemoryPlan(tmp_path / "place", 0, 0, 0)
    setup.run(on_disk, refine_blocks=True, batch_tokens=80, memory=memory)
    assert block_files(on_disk) == block_files(tuned)
    stopped = StoppedAt(tmp_path / "stopped", {})
    with pytest.raises(KeyboardInterrupt):
        setup.run(stopped, refine_blocks=True, batch_tokens=80)
    resumed = WorkDir(tmp_path / "stopped", {})
    assert resumed.finished == 1
    setup.run(resumed, refine_blocks=True, batch_tokens=80)
    assert block_files(resumed) == block_files(tuned)


def test_experts(make_checkpoint: Make, tmp_path: Path) -> None:
    setup = Setup(make_checkpoint("qwen3moe"))
    plain, tuned = WorkDir(tmp_path / "plain", {}), WorkDir(tmp_path / "tuned", {})
    # Random weights, which good rounding leaves little to tune of.
    options = Options(guidance=False, dac=False, descent_rounds=0, alpha=0)
    setup.run(plain, options, batch_tokens=80)
    setup.run(tuned, options, refine_blocks=True, batch_tokens=80)
    before, after = (work.read_block(1) for work in (plain, tuned))
    error, less = after.metrics.output_errors
    assert less < error
    assert before.weights.keys() == after.weights.keys()
    experts = [layer for layer in after.weights if layer.startswith("mlp.experts.")]
    assert len(experts) == 24
    same = [layer for layer in experts if np.array_equal(before.weights[layer].data, after.weights[layer].data)]
    assert len(same) < 4, "those that few tokens are routed to may stay"
    np.testing.assert_array_equal(before.floats["mlp.gate.weight"], after.floats["mlp.gate.weight"])
