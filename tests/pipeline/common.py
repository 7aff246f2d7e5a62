"""Quantize small checkpoints with `quantize_blocks`, and compare with whole models."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from d2q_edge.calibration.hidden_states import StreamPair
from d2q_edge.distributed.process_group import SINGLE_PROCESS
from d2q_edge.formats.quantized_block import QuantizedBlock
from d2q_edge.model.blocks import BlockRunner
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from d2q_edge.options import Options
from d2q_edge.pipeline.block_loop import quantize_blocks
from d2q_edge.pipeline.context import Context
from d2q_edge.pipeline.group_statistics import sublayer_statistics
from d2q_edge.pipeline.norm_correction import advance_quantized
from d2q_edge.pipeline.report import Report
from d2q_edge.pipeline.solver import GroupSolver
from d2q_edge.pipeline.type_plan import plan_types
from d2q_edge.pipeline.work_dir import WorkDir
from d2q_edge.quantize.statistics import InputStatistics
from tests.blocks import changed_tensors

Make = Callable[..., Path]
CPU = torch.device("cpu")
WINDOWS = np.random.default_rng(2).integers(0, 4096, (12, 40))
SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3}
DEFAULT = Options(guidance=False)
PLAIN = Options(dsq=False, dac=False, guidance=False, descent_rounds=0)
EXACT: dict[str, Any] = {"dtype": torch.float32, "batch_tokens": 80}
"""Arguments of `quantize_blocks`: streams that can be compared with whole models, and enough batches for DAC to keep
some for validation."""


class Setup:
    """One checkpoint, and the types of its linear layers."""

    def __init__(self, model: Path, bits: int = 2, type_name: str | None = None) -> None:
        """`type_name` replaces the types that `bits` gives."""
        self.model = model
        self.checkpoint = Checkpoint.open(model)
        self.family = family_for(self.checkpoint.config)
        self.types = dict(plan_types(self.family, bits).linears)
        if type_name is not None:
            self.types = dict.fromkeys(self.types, type_name)

    def runner(self) -> BlockRunner:
        return BlockRunner(self.checkpoint, self.family, CPU)

    def run(
        self,
        work: WorkDir,
        options: Options = DEFAULT,
        *,
        windows: Any = WINDOWS,
        runner: BlockRunner | None = None,
        **more: Any,
    ) -> Report:
        """Quantize; `more` are keyword arguments of `quantize_blocks`."""
        return quantize_blocks(runner or self.runner(), self.types, windows, work, options, **more)

    def tensors(self, work: WorkDir) -> dict[str, torch.Tensor]:
        """Everything that the finished blocks changed, as floats."""
        return changed_tensors(work, self.family)

    def whole_model(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        """transformers' model of the checkpoint with other tensors, which include biases of norms."""
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()
        own = self.family.tensor_shapes()
        _, unexpected = model.load_state_dict({n: t for n, t in tensors.items() if n in own}, strict=False)
        assert unexpected == []
        for name in tensors.keys() - own.keys():
            module, _, parameter = name.rpartition(".")
            assert parameter == "bias"
            assert module.endswith("norm")
            model.get_submodule(module).register_forward_hook(
                lambda _module, _arguments, output, bias=tensors[name]: output + bias
            )
        return model


class CapturingRunner(BlockRunner):
    """Keeps what the final norm is given: the hidden states of both models, batch by batch, after the last block."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup.checkpoint, setup.family, CPU)
        self.inputs: list[torch.Tensor] = []

    def final_norm(self) -> nn.Module:
        norm = super().final_norm()
        norm.register_forward_pre_hook(lambda _, arguments: self.inputs.append(arguments[0].clone()))
        return norm

    def streams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The original's and the quantized model's hidden states, [windows, context, hidden]."""
        assert len(self.inputs) > 2, "one batch would not show that they are kept in order"
        return torch.cat(self.inputs[0::2]), torch.cat(self.inputs[1::2])


class StoppedAt(WorkDir):
    """Ends like Ctrl-C when block `last` is to be written."""

    last = 1

    def write_block(self, index: int, block: QuantizedBlock, *, refined: bool = False) -> None:
        if index == self.last:
            raise KeyboardInterrupt
        super().write_block(index, block, refined=refined)


def collected_statistics(
    setup: Setup, work: WorkDir, options: Options, batch_tokens: int
) -> dict[str, InputStatistics]:
    """The statistics that `work`'s blocks were solved with, by the full name of each layer, in the loop's order.

    They are collected once more by the loop's own steps, without DSQ and DAC; that they are those of the loop is known
    from the solutions, which are the finished blocks' to the last bit.
    """
    runner = setup.runner()
    streams = StreamPair(runner, WINDOWS, batch_tokens, CPU, SINGLE_PROCESS, torch.float32)
    context = Context(runner, streams, SINGLE_PROCESS, Report(CPU))
    solver = GroupSolver(CPU, options.alpha, options.descent_rounds, SINGLE_PROCESS)
    found = {}
    for index in range(setup.family.num_layers):
        prefix, finished = setup.family.block_prefix(index), work.read_block(index)
        types = {layer: setup.types[f"{prefix}{layer}.weight"] for layer in setup.family.block_linears(index)}
        original = runner.load(index)
        quantized = runner.share(original)
        for sublayer in setup.family.block_sublayers(index):
            for group, statistics in sublayer_statistics(context, index, sublayer, original, quantized):
                weights = {layer: quantized.get_submodule(layer).get_parameter("weight") for layer in group.linears}
                solved = solver.solve(weights, types, statistics)
                for layer, weight in solved.weights.items():
                    assert np.array_equal(weight.data, finished.weights[layer].data), layer
                    found[f"{prefix}{layer}.weight"] = statistics
                solved.apply(quantized)
            advance_quantized(context, index, sublayer, original, quantized, None)
    return found


def block_files(work: WorkDir) -> dict[str, bytes]:
    """The content of all finished blocks' files."""
    return {file.name: file.read_bytes() for file in sorted(work.path.glob("block-*"))}
