"""The block-by-block driver: calibration tokens flow through the original and the quantized model side by side.

For every block, in order: load it; run the original stream through it and keep the inputs of its layers; then, stage by
stage (layers that share an input, see families/), gather the statistics of both streams and quantize the stage's
layers, so that every layer sees what the quantized layers before it really put out; at last run the quantized stream
through the finished block. A finished block is on disk (work_dir.py) before the next one starts.

Knows the order of the steps. The steps themselves are in quantize/. Where the other steps of D2Quant belong (DESIGN
section 3): rotation changes the weights that BlockRunner loads, before this driver starts; the column scales (DSQ) and
the mean shift of a norm (DAC) belong to a stage, before its statistics; refinement follows the last block.
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
from d2q_edge.families import Stage
from d2q_edge.quantize.codebook import CodebookSearch
from d2q_edge.quantize.gptaq import ALPHA, InputStatistics, quantize_layer
from d2q_edge.work_dir import Packed, WorkDir

BATCH_TOKENS = 8192
"""Tokens per forward pass."""


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


def quantize_blocks(
    runner: BlockRunner, types: Mapping[str, str], windows: npt.NDArray[np.int64], work: WorkDir, alpha: float = ALPHA
) -> Report:
    """Quantize all blocks; the packed weights end up in `work`.

    Args:
        runner: of the checkpoint.
        types: type of every linear layer's weight, by full name; a layer of a stock type keeps its weights here.
        windows: calibration tokens [windows, context].
        work: keeps finished blocks; those that it has already are not quantized again.
        alpha: see gptaq.py.

    Raises:
        D2QError: a weight or an activation is NaN or infinite, or a block can't be saved.
    """
    driver = _Driver(runner, types, windows, alpha)
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
    return driver.report


class _Driver:
    """Both streams between two blocks, as batches [windows, context, hidden]."""

    def __init__(
        self, runner: BlockRunner, types: Mapping[str, str], windows: npt.NDArray[np.int64], alpha: float
    ) -> None:
        self.runner = runner
        self.types = types
        self.alpha = alpha
        self.report = Report()
        per_batch = max(1, BATCH_TOKENS // windows.shape[1])
        self.original = [runner.embed(part) for part in torch.from_numpy(windows).split(per_batch)]
        self.quantized = list(self.original)
        self._searches: dict[str, CodebookSearch] = {}

    def quantize(self, index: int, block: nn.Module) -> dict[str, Packed]:
        """Quantize one block and move both streams past it; returns its packed weights by full name."""
        stages = self.runner.family.stages
        original_inputs, outputs = self._run_original(block, stages)
        _check_finite(outputs, "original", index)
        packed: dict[str, Packed] = {}
        for stage in stages:
            statistics = self._gather(block, stage, original_inputs.pop(stage.linears[0]))
            packed.update(self._quantize_stage(index, block, stage, statistics))
        self._advance(index, block, outputs)
        return packed

    def replay(self, index: int, block: nn.Module, packed: Mapping[str, Packed]) -> None:
        """Move both streams past a block that was quantized before."""
        outputs = [self._forward(block, hidden) for hidden in self.original]
        prefix = self.runner.family.block_prefix(index)
        for name, data in packed.items():
            layer = block.get_submodule(name.removeprefix(prefix).removesuffix(".weight"))
            weights = tensor_types.dequantize(tensor_types.BY_NAME[self.types[name]], data)
            self._set_weight(layer, torch.from_numpy(weights))
        self._advance(index, block, outputs)

    def mean_error(self, index: int) -> dict[str, str]:
        """For the progress bar: the mean relative error of a block's layers."""
        prefix = self.runner.family.block_prefix(index)
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
                seen, output = self.runner.trace(block, layers, hidden.to(self.runner.device))
            outputs.append(output)
            for name in layers:
                inputs[name].append(seen[name])
        return inputs, outputs

    def _gather(self, block: nn.Module, stage: Stage, original_inputs: list[torch.Tensor]) -> InputStatistics:
        """Statistics of a stage's input, with everything before it in the block quantized."""
        first = stage.linears[0]
        statistics = InputStatistics(original_inputs[0].shape[1], self.runner.device)
        for hidden, original in zip(self.quantized, original_inputs, strict=True):
            with self._timed("forward"):
                reached = self.runner.input_of(block, first, hidden.to(self.runner.device))
            with self._timed("statistics"):
                statistics.add_batch(reached, original)
        return statistics

    def _quantize_stage(
        self, index: int, block: nn.Module, stage: Stage, statistics: InputStatistics
    ) -> dict[str, Packed]:
        """Quantize the layers of a stage, put the result into the block, and return it packed."""
        prefix = self.runner.family.block_prefix(index)
        layers = {f"{prefix}{name}.weight": block.get_submodule(name) for name in stage.linears}
        hessian = statistics.hessian
        packed: dict[str, Packed] = {}
        # Rows don't influence each other, so that layers of one type and one input are quantized as one matrix.
        for kind in dict.fromkeys(self.types[name] for name in layers):
            if kind not in tensor_types.BY_NAME:
                continue
            same = {name: _weight(layer) for name, layer in layers.items() if self.types[name] == kind}
            with self._timed("solve"):
                result = quantize_layer(torch.cat(list(same.values())), statistics, self._search(kind), self.alpha)
            data = result.pack(tensor_types.BY_NAME[kind])
            start = 0
            for name, weight in same.items():
                stop = start + len(weight)
                self.report.layer_errors[name] = _relative_error(weight, result.weights[start:stop], hessian)
                self._set_weight(layers[name], result.weights[start:stop])
                packed[name] = data[start:stop]
                start = stop
        return packed

    def _search(self, kind: str) -> CodebookSearch:
        if kind not in self._searches:
            self._searches[kind] = CodebookSearch(tensor_types.BY_NAME[kind], self.runner.device)
        return self._searches[kind]

    def _advance(self, index: int, block: nn.Module, outputs: list[torch.Tensor]) -> None:
        self.original = outputs
        self.quantized = [self._forward(block, hidden) for hidden in self.quantized]
        _check_finite(self.quantized, "quantized", index)

    def _forward(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        with self._timed("forward"):
            return self.runner.forward(block, hidden.to(self.runner.device))

    def _set_weight(self, layer: nn.Module, weight: torch.Tensor) -> None:
        layer.weight = nn.Parameter(weight.to(self.runner.device), requires_grad=False)

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


def _relative_error(weights: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor) -> float:
    """Squared error of the outputs over the squared outputs: tr(E H E^T) / tr(W H W^T)."""
    error = weights - quantized
    total = ((weights @ hessian) * weights).sum()
    return float(((error @ hessian) * error).sum() / total) if total > 0 else 0.0
