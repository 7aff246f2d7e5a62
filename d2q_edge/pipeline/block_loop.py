"""The block-by-block driver: calibration tokens flow through the original and the quantized model side by side.

For every block, in order: load it (the teacher); give its layers column scales (DSQ), which leave its function alone;
quantize a copy of it (the student). That goes linear group by linear group (layers that share an input, see families/): the teacher's
inputs come from the original stream and the student's from the quantized one, so that every layer is quantized for what
the quantized layers before it really put out (experts: expert_pipeline.py). Behind each sublayer of the block both streams
move on, and the mean shift of the next norm is corrected (DAC). A finished block is on disk (work_dir.py) before the
next one is. After the last block come the final norm and the head.

Everything passes through in batches: what stays in memory is the two streams (streams.py), one block twice, and the
statistics of one linear group. Several processes share the batches, and the rows of a matrix (processes.py).

Knows the order of the steps. The steps themselves are in quantize/. Rotation has happened before: it changes the
weights that BlockRunner loads. Refinement comes after: it needs all blocks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from d2q_edge.calibration.hidden_states import Place, Stream
from d2q_edge.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from d2q_edge.errors import D2QError
from d2q_edge.formats import tensor_types
from d2q_edge.model.blocks import BlockRunner
from d2q_edge.model.families import Family, LinearGroup, Sublayer
from d2q_edge.pipeline.column_scaling import COLUMN_SCALE, ENERGY_SHARE, ColumnScaling, check_sums, float_array
from d2q_edge.pipeline.expert_statistics import ExpertGroups
from d2q_edge.pipeline.progress import Progress
from d2q_edge.pipeline.report import Report
from d2q_edge.pipeline.solver import GroupSolver
from d2q_edge.pipeline.validation import ValidationStreams
from d2q_edge.pipeline.work_dir import BlockWriter, Tensor, WorkDir
from d2q_edge.quantize.dac import MeanShift
from d2q_edge.quantize.dsq import InputEnergy, column_scales
from d2q_edge.quantize.matmul import matmul_precision
from d2q_edge.quantize.statistics import InputStatistics

BATCH_TOKENS = 4096
"""Tokens per forward pass. It decides a little of the result: the mean shift's guard counts in batches."""


@dataclass(frozen=True)
class Method:
    """What is done to a block.

    Attributes:
        alpha: weight of the input's error in the error feedback, see gptaq.py; 0 is GPTQ.
        dsq: give columns scales, see dsq.py.
        dac: give norms biases, see dac.py.
        rounds: of coordinate descent after the error feedback, see descent.py.
    """

    alpha: float = 0.5
    dsq: bool = True
    dac: bool = True
    rounds: int = 2


def corrected_norms(family: Family, method: Method) -> list[str]:
    """Full names of the norms that may get a bias: of every block those behind quantized layers, and the final one."""
    if not method.dac:
        return []
    inner = [sublayer.norm for sublayer in family.sublayers[1:]]
    blocks = [f"{family.block_prefix(index)}{norm}" for index in range(family.num_layers) for norm in inner]
    return [*blocks, family.final_norm]


def quantize_blocks(
    runner: BlockRunner,
    types: Mapping[str, str],
    windows: npt.NDArray[np.int64],
    work: WorkDir,
    method: Method = Method(),
    *,
    validation: npt.NDArray[np.int64] | None = None,
    place: Place | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> Report:
    """Quantize all blocks; the results end up in `work`.

    A block's tensors there: the packed weights of linear layers, uint8, and whatever else is not the checkpoint's,
    float32: norm weights, biases, weights of stock types; and the COLUMN_SCALE of every linear group. Behind the last block
    there is one more entry, with the final norm's weight and bias and the head's COLUMN_SCALE.

    Args:
        runner: of the checkpoint.
        types: type of every linear layer's weight, by full name; a layer of a stock type keeps its precision here.
        windows: calibration tokens [windows, context].
        work: keeps finished blocks; those that it has already are not quantized again.
        method: what is done.
        validation: more windows, which change nothing; the result is measured on them.
        place: where the hidden states are kept (streams.py); None is the computer's memory.
        processes: the processes that share the work; all of them call this.

    Raises:
        D2QError: a weight or an activation is NaN or infinite, or a block can't be saved.
    """
    family, blocks = runner.family, runner.family.num_layers
    # Asked once, before the first process writes anything.
    finished = [work.has_block(index) for index in range(blocks + 1)]
    processes.barrier()
    place = place or torch.device("cpu")
    with (
        Progress(family, types, quiet=not processes.is_main) as progress,
        BlockWriter(work, active=processes.is_main) as writer,
        torch.inference_mode(),
        matmul_precision("high"),
    ):
        beside = None
        if validation is not None and len(validation):
            beside = ValidationStreams(runner, validation, BATCH_TOKENS, place, processes)
        driver = _Driver(runner, types, windows, method, place, processes, beside, progress.layer)
        report = driver.report
        for index in range(blocks):
            if finished[index]:
                driver.replay(index, work.read_block(index))
                report.recall(work.read_facts(index))
                progress.skip_block(index)
            else:
                result = driver.quantize(index)
                writer.write(index, result, report.kept(family.block_prefix(index)))
        if finished[blocks]:
            result = work.read_block(blocks)
            report.recall(work.read_facts(blocks))
        else:
            result = driver.finish()
            writer.write(blocks, result, report.kept(family.final_norm, family.head))
        if beside is not None:
            bias = result.get(f"{family.final_norm}.bias", np.zeros(1, np.float32))
            scales = result.get(f"{family.head}.{COLUMN_SCALE}", np.ones(1, np.float32))
            report.validation = beside.measure(torch.from_numpy(bias / scales))
    processes.barrier()
    return driver.report


class _Driver:
    """Both streams between two blocks."""

    def __init__(
        self,
        runner: BlockRunner,
        types: Mapping[str, str],
        windows: npt.NDArray[np.int64],
        method: Method,
        place: Place,
        processes: ProcessGroup,
        validation: ValidationStreams | None = None,
        say: Callable[[str, float], None] = lambda *_: None,
    ) -> None:
        self.validation, self.say = validation, say
        self.runner, self.family, self.types, self.method, self.processes = (
            runner,
            runner.family,
            types,
            method,
            processes,
        )
        self.report = Report(runner.device)
        self.scaling = ColumnScaling(runner, self.report, processes)
        self.solver = GroupSolver(runner.device, method.alpha, method.rounds, processes)
        batches = torch.from_numpy(windows).split(max(1, BATCH_TOKENS // windows.shape[1]))
        self.own = processes.shard_range(len(batches))
        shape = windows.shape[1], self.family.hidden_size
        self.original, self.quantized = (
            Stream([len(part) for part in batches], shape, runner.device, place) for _ in range(2)
        )
        for index, hidden in zip(self.own, runner.embed_all([batches[index] for index in self.own]), strict=True):
            self.original[index] = self.quantized[index] = hidden

    def quantize(self, index: int) -> dict[str, Tensor]:
        """Quantize one block and move both streams past it; returns its new tensors by full name."""
        prefix = self.family.block_prefix(index)
        teacher = self.runner.load(index)
        result: dict[str, Tensor] = {}
        if self.method.dsq:
            result |= self.scaling.apply(teacher, prefix, self.original, self.own)
        student = self.runner.share(teacher)
        for number, sublayer in enumerate(self.family.sublayers):
            if self._has_experts(sublayer):
                result |= self._quantize_experts(prefix, teacher, student, sublayer)
            else:
                result |= self._quantize_sublayer(prefix, teacher, student, sublayer)
            following = self.family.sublayers[number + 1 :][:1]
            for norm, shift in self._move(prefix, teacher, student, sublayer, following).items():
                self.runner.add_norm_bias(student, norm, shift)
                result[f"{norm}.bias"] = float_array(shift)
        self._move_held_back(teacher, student)
        return {f"{prefix}{name}": data for name, data in result.items()}

    def replay(self, index: int, result: Mapping[str, Tensor]) -> None:
        """Move both streams past a block that was quantized before, by the same steps as then, to the last bit."""
        teacher = self.runner.load(index)
        prefix = self.family.block_prefix(index)
        inner = {name.removeprefix(prefix): data for name, data in result.items()}
        for group in self.family.linear_groups:
            if (scales := inner.pop(f"{group.linears[0]}.{COLUMN_SCALE}", None)) is not None:
                self.scaling.absorb(teacher, group, torch.from_numpy(scales).to(self.runner.device))
        student = self.runner.share(teacher)
        biases = {
            f"{sublayer.norm}.bias": sublayer for sublayer in self.family.sublayers if f"{sublayer.norm}.bias" in inner
        }
        for name, data in inner.items():
            module, _, parameter = name.rpartition(".")
            if name not in biases:
                values = self._floats(prefix + name, data)
                _set(student.get_submodule(module), parameter, values.to(self.runner.device))
        for sublayer in self.family.sublayers:
            if (bias := f"{sublayer.norm}.bias") in biases:
                self.runner.add_norm_bias(student, sublayer.norm, torch.from_numpy(inner[bias]))
            for batch in self.own:
                self.original[batch] = self.runner.sublayer_forward(teacher, sublayer, self.original[batch])
                self.quantized[batch] = self.runner.sublayer_forward(student, sublayer, self.quantized[batch])
        self._move_held_back(teacher, student)

    def _move_held_back(self, teacher: nn.Module, student: nn.Module) -> None:
        if self.validation is not None:
            with self.report.timed("held-back text"):
                self.validation.move(teacher, student)

    def finish(self) -> dict[str, Tensor]:
        """The final norm's new weight and bias, and the head's column scale, by full name."""
        norm, name = self.runner.final_norm(), self.family.final_norm
        energy = InputEnergy(self.family.hidden_size, self.runner.device)
        shift = MeanShift(self.family.hidden_size, len(self.original))
        for index in self.own:
            teacher = norm(self.original[index])
            if index % ENERGY_SHARE == 0:
                energy.add_batch(teacher)
            shift.add_batch(index, teacher, norm(self.quantized[index]))
        result: dict[str, Tensor] = {}
        scales = torch.ones_like(norm.get_parameter("weight"))
        if self.method.dsq and not self.family.tied_embeddings:
            self.processes.all_reduce(energy.sums)
            head = self.runner.checkpoint.tensor(f"{self.family.head}.weight")
            weights = sum(part.to(self.runner.device).float().square().sum(0) for part in head.split(8192))
            scales = column_scales(weights, energy.conditional())
            result[f"{name}.weight"] = float_array(self.scaling.scaled_norm(norm, scales))
            result[f"{self.family.head}.{COLUMN_SCALE}"] = float_array(scales)
            self.report.add_scales(self.family.head, scales)
        if self.method.dac:
            self.processes.all_reduce([shift.moments])
            self.report.add_shift(name, shift.stats())
            if (bias := shift.bias()) is not None:
                result[f"{name}.bias"] = float_array(bias.to(scales) * scales)
        return result

    def _quantize_sublayer(
        self, prefix: str, teacher: nn.Module, student: nn.Module, sublayer: Sublayer
    ) -> dict[str, Tensor]:
        """Quantize the layers of one half, and move the original stream past it."""
        result: dict[str, Tensor] = {}
        linear_groups = [group for group in self.family.linear_groups if self.family.sublayer_of(group) == sublayer]
        for group in linear_groups:
            statistics = self._statistics(
                prefix, teacher, student, group, sublayer if group is linear_groups[-1] else None
            )
            result |= self._quantize_group(prefix, student, group, statistics)
        return result

    def _quantize_experts(
        self, prefix: str, teacher: nn.Module, student: nn.Module, sublayer: Sublayer
    ) -> dict[str, Tensor]:
        """The same of a sublayer with experts."""
        streams = self.original, self.quantized
        experts = ExpertGroups(self.runner, teacher, student, sublayer, streams, self.processes, self.report)
        result = experts.quantize(partial(self._quantize_group, prefix, student))
        finite = torch.ones((), dtype=torch.bool, device=self.runner.device)
        for index in self.own:
            with self.report.timed("forward"):
                self.original[index] = moved = self.runner.sublayer_forward(teacher, sublayer, self.original[index])
            finite &= moved.isfinite().all()
        _check_finite(finite, "original", f"{prefix}{sublayer.module}")
        return result

    def _has_experts(self, sublayer: Sublayer) -> bool:
        return any(router.startswith(f"{sublayer.module}.") for router in self.family.block_routers())

    def _statistics(
        self, prefix: str, teacher: nn.Module, student: nn.Module, group: LinearGroup, sublayer: Sublayer | None
    ) -> InputStatistics:
        """Of a linear group's input in both streams. Given `sublayer`, the original stream moves past it in the same pass."""
        layer = group.linears[0]
        statistics = InputStatistics(self.family.linear_shape(layer)[1], self.runner.device)
        finite = torch.ones((), dtype=torch.bool, device=self.runner.device)
        for index in self.own:
            hidden = self.original[index]
            with self.report.timed("forward"):
                if sublayer is None:
                    wanted = self.runner.group_input(teacher, group, hidden)
                else:
                    seen, moved = self.runner.sublayer_trace(teacher, sublayer, (layer,), hidden)
                    wanted, self.original[index] = seen[layer], moved
                    finite &= moved.isfinite().all()
                reached = self.runner.group_input(student, group, self.quantized[index])
            with self.report.timed("statistics"):
                statistics.add_batch(reached, wanted)
        _check_finite(finite, "original", f"{prefix}{layer}")
        self.processes.all_reduce(statistics.sums)
        check_sums(statistics.sums, f"{prefix}{layer}")
        return statistics

    def _quantize_group(
        self, prefix: str, student: nn.Module, group: LinearGroup, statistics: InputStatistics
    ) -> dict[str, Tensor]:
        """Quantize the layers of a linear group, put the result into the student, and return it, by name in the block."""
        layers = {f"{name}.weight": student.get_submodule(name) for name in group.linears}
        result: dict[str, Tensor] = {}
        for kind in dict.fromkeys(self.types[prefix + name] for name in layers):
            same = {
                name: layer.get_parameter("weight")
                for name, layer in layers.items()
                if self.types[prefix + name] == kind
            }
            if kind not in tensor_types.BY_NAME:
                result |= {name: float_array(weight) for name, weight in same.items()}
                continue
            with self.report.timed("solve"):
                for name, (data, weights, error) in self.solver.solve(same, kind, statistics).items():
                    _set(layers[name], "weight", weights)
                    result[name] = data
                    self.report.layer_errors[prefix + name] = error
                    self.say(prefix + name, error)
        return result

    def _move(
        self, prefix: str, teacher: nn.Module, student: nn.Module, sublayer: Sublayer, following: tuple[Sublayer, ...]
    ) -> dict[str, torch.Tensor]:
        """Move the quantized stream past a sublayer, and find the mean shift of the following sublayer's norm: its output with
        this sublayer quantized against its output with the teacher's, both from the same input."""
        shifts = {}
        if self.method.dac:
            shifts = {each.norm: MeanShift(self.family.hidden_size, len(self.original)) for each in following}
        finite = torch.ones((), dtype=torch.bool, device=self.runner.device)
        for index in self.own:
            hidden = self.quantized[index]
            with self.report.timed("forward"):
                moved = self.runner.sublayer_forward(student, sublayer, hidden)
                unquantized = self.runner.sublayer_forward(teacher, sublayer, hidden) if shifts else moved
                for name, shift in shifts.items():
                    norm = student.get_submodule(name)
                    shift.add_batch(index, norm(unquantized), norm(moved))
            self.quantized[index] = moved
            finite &= moved.isfinite().all()
        _check_finite(finite, "quantized", f"{prefix}{sublayer.module}")
        self.processes.all_reduce([shift.moments for shift in shifts.values()])
        for name, shift in shifts.items():
            self.report.add_shift(prefix + name, shift.stats())
        found = {name: shift.bias() for name, shift in shifts.items()}
        return {name: bias.to(self.runner.device) for name, bias in found.items() if bias is not None}

    def _floats(self, name: str, data: Tensor) -> torch.Tensor:
        """A block's tensor as it is used: packed weights are dequantized."""
        if data.dtype == np.uint8:
            return torch.from_numpy(
                tensor_types.dequantize(tensor_types.BY_NAME[self.types[name]], data.view(np.uint8))
            )
        return torch.from_numpy(data.astype(np.float32, copy=False))


def _check_finite(finite: torch.Tensor, which: str, name: str) -> None:
    if not bool(finite):
        raise D2QError(f"the activations of the {which} model are NaN or infinite behind {name}")


def _set(module: nn.Module, parameter: str, values: torch.Tensor) -> None:
    setattr(module, parameter, nn.Parameter(values, requires_grad=False))
