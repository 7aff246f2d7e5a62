"""The block-by-block driver: calibration tokens flow through the original and the quantized model side by side.

For every block, in order: load it; run the original stream through it and keep the inputs of its layers; give its
layers column scales (DSQ); then, stage by stage (layers that share an input, see families/), correct the mean shift of
the norm (DAC), gather the statistics of both streams and quantize the stage's layers, so that every layer sees what the
quantized layers before it really put out; at last run the quantized stream through the finished block. A finished block
is on disk (work_dir.py) before the next one starts. After the last block come the final norm and the head.

Knows the order of the steps. The steps themselves are in quantize/. Rotation has happened before: it changes the
weights that BlockRunner loads. Refinement comes after: it needs all blocks.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm import tqdm

from d2q_edge import tensor_types
from d2q_edge.blocks import BlockRunner
from d2q_edge.errors import D2QError
from d2q_edge.families import Family, Stage
from d2q_edge.quantize.codebook import CodebookSearch
from d2q_edge.quantize.dac import mean_shift
from d2q_edge.quantize.descent import ROUNDS, descend
from d2q_edge.quantize.dsq import absorb, column_scales, conditional_energy, weight_energy
from d2q_edge.quantize.gptaq import ALPHA, InputStatistics, quantize_layer
from d2q_edge.quantize.layer import QuantizedLayer
from d2q_edge.work_dir import Tensor, WorkDir

BATCH_TOKENS = 8192
"""Tokens per forward pass."""
ENERGY_SHARE = 4
"""Every fourth batch is enough for the column scales."""
COLUMN_SCALE = "column_scale"
"""Last part of a name: the column scale of a stage, kept under the stage's first layer, or of the head."""


@dataclass
class Report:
    """What a run measured.

    Attributes:
        layer_errors: weight name to the squared error of the layer's output relative to the output itself, on the
            calibration tokens. Blocks that were finished by an earlier run are absent.
        seconds: phase to seconds.
    """

    layer_errors: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))


@dataclass(frozen=True)
class Method:
    """What is done to a block.

    Attributes:
        alpha: weight of the input's error in the error feedback, see gptaq.py; 0 is GPTQ.
        dsq: give columns scales, see dsq.py.
        dac: give norms biases, see dac.py.
        rounds: of coordinate descent after the error feedback, see descent.py.
    """

    alpha: float = ALPHA
    dsq: bool = True
    dac: bool = True
    rounds: int = ROUNDS


def corrected_norms(family: Family, method: Method) -> list[str]:
    """Full names of the norms that may get a bias: of every block those behind quantized layers, and the final one."""
    if not method.dac:
        return []
    inner = _corrected(family, method)
    blocks = [f"{family.block_prefix(index)}{norm}" for index in range(family.num_layers) for norm in inner]
    return [*blocks, family.final_norm]


def _corrected(family: Family, method: Method) -> dict[str, Stage]:
    """A block's norms that get a bias, with their stages: those with quantized layers of the same block before them."""
    return {stage.norm: stage for stage in family.stages[1:] if stage.norm is not None} if method.dac else {}


def quantize_blocks(
    runner: BlockRunner,
    types: Mapping[str, str],
    windows: npt.NDArray[np.int64],
    work: WorkDir,
    method: Method = Method(),
) -> Report:
    """Quantize all blocks; the results end up in `work`.

    A block's tensors there: the packed weights of linear layers, uint8, and whatever else is not the checkpoint's,
    float32: norm weights, biases, weights of stock types; and the COLUMN_SCALE of every stage. Behind the last block
    there is one more entry, with the final norm's weight and bias and the head's COLUMN_SCALE.

    Args:
        runner: of the checkpoint.
        types: type of every linear layer's weight, by full name; a layer of a stock type keeps its precision here.
        windows: calibration tokens [windows, context].
        work: keeps finished blocks; those that it has already are not quantized again.
        method: what is done.

    Raises:
        D2QError: a weight or an activation is NaN or infinite, or a block can't be saved.
    """
    driver = _Driver(runner, types, windows, method)
    blocks = runner.family.num_layers
    with tqdm(total=blocks, desc="Quantizing", unit="block", disable=None) as progress, torch.inference_mode():
        for index in range(blocks):
            block = runner.load(index)
            if work.has_block(index):
                driver.replay(index, block, work.read_block(index))
            else:
                work.write_block(index, driver.quantize(index, block))
                progress.set_postfix(driver.mean_error(index))
            runner.unload(index)
            progress.update()
        if not work.has_block(blocks):
            work.write_block(blocks, driver.finish())
    return driver.report


class _Driver:
    """Both streams between two blocks, as batches [windows, context, hidden]."""

    def __init__(
        self, runner: BlockRunner, types: Mapping[str, str], windows: npt.NDArray[np.int64], method: Method
    ) -> None:
        self.runner = runner
        self.family = runner.family
        self.types = types
        self.method = method
        self.report = Report()
        per_batch = max(1, BATCH_TOKENS // windows.shape[1])
        self.original = [runner.embed(part) for part in torch.from_numpy(windows).split(per_batch)]
        self.quantized = list(self.original)
        self._searches: dict[str, CodebookSearch] = {}

    def quantize(self, index: int, block: nn.Module) -> dict[str, Tensor]:
        """Quantize one block and move both streams past it; returns its new tensors by full name."""
        stages = self.family.stages
        original_inputs, outputs = self._run_original(block, stages)
        _check_finite(outputs, "original", index)
        result: dict[str, Tensor] = {}
        if self.method.dsq:
            for stage in stages:
                result.update(self._scale_columns(block, stage, original_inputs[stage.linears[0]]))
        teachers = {norm: self._teacher(block, stage) for norm, stage in _corrected(self.family, self.method).items()}
        for stage in stages:
            with self._timed("forward"):
                inputs = [self.runner.stage_input(block, stage, self._here(hidden)) for hidden in self.quantized]
            if stage.norm in teachers:
                shift = mean_shift(teachers.pop(stage.norm), inputs)
                if shift is not None:
                    self.runner.add_norm_bias(block, stage.norm, shift)
                    inputs = [seen + shift for seen in inputs]
                    result[f"{stage.norm}.bias"] = _array(shift)
            with self._timed("statistics"):
                statistics = InputStatistics(inputs[0].shape[1], self.runner.device)
                for seen, original in zip(inputs, original_inputs.pop(stage.linears[0]), strict=True):
                    statistics.add_batch(seen, original)
            result.update(self._quantize_stage(index, block, stage, statistics))
            if stage.norm is None:
                # These layers' outputs are added to the residual stream, which the next half of the block reads.
                layer = block.get_submodule(stage.linears[0])
                with self._timed("forward"):
                    self.quantized = [
                        self._here(hidden) + layer(seen.view(*hidden.shape[:-1], -1))
                        for hidden, seen in zip(self.quantized, inputs, strict=True)
                    ]
        self.original = outputs
        _check_finite(self.quantized, "quantized", index)
        prefix = self.family.block_prefix(index)
        return {f"{prefix}{name}": data for name, data in result.items()}

    def replay(self, index: int, block: nn.Module, result: Mapping[str, Tensor]) -> None:
        """Move both streams past a block that was quantized before."""
        outputs = [self._forward(block, hidden) for hidden in self.original]
        prefix = self.family.block_prefix(index)
        for name, data in result.items():
            module, _, parameter = name.removeprefix(prefix).rpartition(".")
            values = torch.from_numpy(self._floats(name, data))
            if parameter == COLUMN_SCALE:
                continue
            if parameter == "bias" and module in self.family.block_norms():
                self.runner.add_norm_bias(block, module, values)
            else:
                self._set(block.get_submodule(module), parameter, values)
        self.original = outputs
        self.quantized = [self._forward(block, hidden) for hidden in self.quantized]
        _check_finite(self.quantized, "quantized", index)

    def finish(self) -> dict[str, Tensor]:
        """The final norm's new weight and bias, and the head's column scale, by full name."""
        norm, name = self.runner.final_norm(), self.family.final_norm
        teacher, student = (
            [norm(self._here(hidden)).flatten(0, -2) for hidden in stream] for stream in (self.original, self.quantized)
        )
        result: dict[str, Tensor] = {}
        scales = torch.ones_like(_weight(norm))
        if self.method.dsq and not self.family.tied_embeddings:
            head = self.runner.checkpoint.tensor(f"{self.family.head}.weight").to(self.runner.device)
            scales = column_scales(head.float().square().sum(0), conditional_energy(teacher[::ENERGY_SHARE]))
            result[f"{name}.weight"] = _array(_weight(norm) * scales)
            result[f"{self.family.head}.{COLUMN_SCALE}"] = _array(scales)
        shift = mean_shift(teacher, student) if self.method.dac else None
        if shift is not None:
            result[f"{name}.bias"] = _array(shift * scales)
        return result

    def mean_error(self, index: int) -> dict[str, str]:
        """For the progress bar: the mean relative error of a block's layers."""
        prefix = self.family.block_prefix(index)
        errors = [error for name, error in self.report.layer_errors.items() if name.startswith(prefix)]
        return {"error": f"{np.mean(errors):.4f}"} if errors else {}

    def _run_original(
        self, block: nn.Module, stages: tuple[Stage, ...]
    ) -> tuple[dict[str, list[torch.Tensor]], list[torch.Tensor]]:
        """The original stream: the inputs of every stage, by its first layer, and the block's outputs."""
        layers = tuple(stage.linears[0] for stage in stages)
        inputs: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
        outputs = []
        for hidden in self.original:
            with self._timed("forward"):
                seen, output = self.runner.trace(block, layers, self._here(hidden))
            outputs.append(output)
            for name in layers:
                inputs[name].append(seen[name])
        return inputs, outputs

    def _teacher(self, block: nn.Module, stage: Stage) -> list[torch.Tensor]:
        """A stage's input in the quantized stream, with the block as it is now: [tokens, columns] batch by batch."""
        with self._timed("forward"):
            return [self.runner.input_of(block, stage.linears[0], self._here(hidden)) for hidden in self.quantized]

    def _scale_columns(self, block: nn.Module, stage: Stage, inputs: list[torch.Tensor]) -> dict[str, Tensor]:
        """Give a stage's layers column scales, and its inputs, from the original stream, the same.

        Returns what changed and won't be quantized, by name in the block.
        """
        maker = stage.norm or stage.source
        if maker is None:
            return {}
        rows = None
        if stage.source is not None:
            rows = torch.from_numpy(self.family.source_rows(stage.source)).to(self.runner.device)
        layers = [block.get_submodule(name) for name in stage.linears]
        scales = column_scales(weight_energy(layers), conditional_energy(inputs[::ENERGY_SHARE]), rows)
        absorb(layers, block.get_submodule(maker), scales, rows)
        for seen in inputs:
            seen.mul_(scales)
        parameters = dict(block.get_submodule(maker).named_parameters(recurse=False))
        if stage.source is not None:
            del parameters["weight"]
        changed = {f"{maker}.{name}": _array(values) for name, values in parameters.items()}
        return {**changed, f"{stage.linears[0]}.{COLUMN_SCALE}": _array(scales)}

    def _quantize_stage(
        self, index: int, block: nn.Module, stage: Stage, statistics: InputStatistics
    ) -> dict[str, Tensor]:
        """Quantize the layers of a stage, put the result into the block, and return it, by name in the block."""
        prefix = self.family.block_prefix(index)
        layers = {f"{name}.weight": block.get_submodule(name) for name in stage.linears}
        hessian = statistics.hessian
        result: dict[str, Tensor] = {}
        # Rows don't influence each other, so that layers of one type and one input are quantized as one matrix.
        for kind in dict.fromkeys(self.types[prefix + name] for name in layers):
            same = {name: _weight(layer) for name, layer in layers.items() if self.types[prefix + name] == kind}
            if kind not in tensor_types.BY_NAME:
                result |= {name: _array(weight) for name, weight in same.items()}
                continue
            with self._timed("solve"):
                quantized = self._quantize_matrix(torch.cat(list(same.values())), statistics, self._search(kind))
            data = quantized.pack(tensor_types.BY_NAME[kind])
            start = 0
            for name, weight in same.items():
                stop = start + len(weight)
                error = _relative_error(weight, quantized.weights[start:stop], hessian)
                self.report.layer_errors[prefix + name] = error
                self._set(layers[name], "weight", quantized.weights[start:stop])
                result[name] = data[start:stop]
                start = stop
        return result

    def _quantize_matrix(
        self, weights: torch.Tensor, statistics: InputStatistics, search: CodebookSearch
    ) -> QuantizedLayer:
        layer = quantize_layer(weights, statistics, search, self.method.alpha)
        return descend(layer, weights, statistics, search, self.method.alpha, rounds=self.method.rounds)

    def _search(self, kind: str) -> CodebookSearch:
        if kind not in self._searches:
            self._searches[kind] = CodebookSearch(tensor_types.BY_NAME[kind], self.runner.device)
        return self._searches[kind]

    def _floats(self, name: str, data: Tensor) -> npt.NDArray[np.float32]:
        """A block's tensor as it is used: packed weights are dequantized."""
        if data.dtype == np.uint8:
            return tensor_types.dequantize(tensor_types.BY_NAME[self.types[name]], data.view(np.uint8))
        return data.astype(np.float32, copy=False)

    def _forward(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        with self._timed("forward"):
            return self.runner.forward(block, self._here(hidden))

    def _here(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.to(self.runner.device)

    def _set(self, module: nn.Module, parameter: str, values: torch.Tensor) -> None:
        setattr(module, parameter, nn.Parameter(values.to(self.runner.device), requires_grad=False))

    def _timed(self, phase: str) -> "_Timer":
        return _Timer(self.report.seconds, phase, self.runner.device)


class _Timer:
    """Adds the time spent in a with block to a phase."""

    def __init__(self, seconds: dict[str, float], phase: str, device: torch.device) -> None:
        self.seconds, self.phase = seconds, phase
        self._wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def __enter__(self) -> None:
        self._wait()
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._wait()
        self.seconds[self.phase] += time.perf_counter() - self.start


def _check_finite(stream: list[torch.Tensor], which: str, index: int) -> None:
    if not all(bool(hidden.isfinite().all()) for hidden in stream):
        raise D2QError(f"the activations of the {which} model are NaN or infinite after block {index}")


def _weight(layer: nn.Module) -> torch.Tensor:
    weight = layer.weight
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"{layer} has no weight")
    return weight


def _array(values: torch.Tensor) -> Tensor:
    """Float32 values on the CPU, as they are kept in the work directory."""
    array: Tensor = values.detach().float().cpu().numpy()
    return array


def _relative_error(weights: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor) -> float:
    """Squared error of the outputs over the squared outputs: tr(E H E^T) / tr(W H W^T)."""
    error = weights - quantized
    total = ((weights @ hessian) * weights).sum()
    return float(((error @ hessian) * error).sum() / total) if total > 0 else 0.0
