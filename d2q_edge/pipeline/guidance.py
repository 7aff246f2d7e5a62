"""Let the original model's gradients guide the rounding (calibration/output_gradients.py measures them).

GuidedQuant (arXiv 2505.07004): a token counts in a layer's H and dXXT by the squared gradient of the loss at the
layer's output. YAQA (arXiv 2505.22988): the errors of a layer's rows count together, by G (quantize/output_hessian.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from d2q_edge.calibration.output_gradients import BlockGradients, guided_modules, kept_bytes, output_gradients
from d2q_edge.distributed.process_group import ProcessGroup
from d2q_edge.model.blocks import BlockRunner
from d2q_edge.pipeline.work_dir import WorkDir
from d2q_edge.quantize.output_hessian import OutputHessian
from d2q_edge.utils.progress import Progress

POWER = 0.5
CLIP = 50.0
"""Squared gradients are clipped at so many times their mean, and then raised to POWER."""
OUTPUT_TOKENS = 32768
"""Tokens that count in the output Hessians: half as many are worse, twice as many hardly better (qwen3-34m)."""
PASS_TOKENS = 16384
"""Tokens between two saves, at most, where loading the blocks once more costs little of the time."""

TINY = torch.finfo(torch.float32).tiny

Weights = Mapping[str, Mapping[int, torch.Tensor]]


class Guidance:
    """Weights of this process's calibration tokens, and the output Hessians."""

    def __init__(self, squares: Weights, processes: ProcessGroup, work: WorkDir | None = None) -> None:
        """Take the squared gradients by module and batch, float32 [tokens], of all tokens of this process.

        `work` has the output Hessians.
        """
        self._squares, self._processes, self._work = squares, processes, work

    def output_hessians(self, index: int, rows: Mapping[str, int], device: torch.device) -> dict[str, OutputHessian]:
        """Return G of the groups of block `index` on a device, if it is kept; every process must call this.

        Args:
            index: of the block.
            rows: of every group together, by its first layer.
            device: for the result.

        Raises:
            D2QError: the file that has it is damaged.
        """
        if self._work is None:
            return {}
        arrays, _ = self._work.read_outputs(self._processes.rank, index)
        result = {}
        for layer, count in rows.items():
            found = OutputHessian.from_arrays(arrays, layer).to(device)
            if not found.pieces:  # none of this process's batches count
                found = OutputHessian.zeros(count, device)
            self._processes.all_reduce(found.pieces)
            result[layer] = found
        return result

    def weights(self, prefix: str, modules: Sequence[str]) -> dict[int, torch.Tensor]:
        """Return the weights of all tokens for layers that read the same input, by batch: float32 [tokens], mean 1.

        Every process must call this.
        """
        squares = [self._squares[prefix + module] for module in modules]
        means = [self._mean(parts) for parts in squares]
        weights = {}
        for batch in squares[0]:
            relative = [parts[batch] / max(mean, TINY) for parts, mean in zip(squares, means, strict=True)]
            weights[batch] = torch.stack(relative).mean(0).clamp(max=CLIP) ** POWER
        mean = self._mean(weights)
        # Without any gradient, as in a layer that nothing depends on, all tokens count alike.
        return {batch: values / mean if mean else torch.ones_like(values) for batch, values in weights.items()}

    def _mean(self, parts: Mapping[int, torch.Tensor]) -> float:
        """Return the mean over the tokens of all processes."""
        total = torch.zeros(2, dtype=torch.float64)
        for values in parts.values():
            total += torch.tensor([float(values.sum(dtype=torch.float64)), values.numel()], dtype=torch.float64)
        self._processes.all_reduce([total])
        return float(total[0] / total[1])


def measure_guidance(
    runner: BlockRunner,
    windows: npt.NDArray[np.int64],
    batch_tokens: int,
    memory: int,
    work: WorkDir,
    processes: ProcessGroup,
) -> Guidance:
    """Measure the gradients for all calibration tokens, some batches at a time; each pass is kept in `work`.

    Args:
        runner: of the original model.
        windows: token ids, int64 [windows, context].
        batch_tokens: tokens of a batch, as in the block loop.
        memory: bytes that hidden states may take.
        work: keeps finished passes; those that it has are not measured again.
        processes: that share the batches.

    Raises:
        D2QError: a weight is NaN or infinite, or a pass can't be saved.
    """
    batches = torch.from_numpy(windows).split(max(1, batch_tokens // windows.shape[1]))
    own = processes.shard_range(len(batches))
    most = memory // kept_bytes(runner.family, len(batches[0]) * windows.shape[1])
    if runner.device.type != "cuda":
        most = min(most, PASS_TOKENS // batch_tokens)
    size = max(1, most)
    stride = math.ceil(len(batches) * batch_tokens / OUTPUT_TOKENS)
    observed = [batch for batch in own if batch % stride == 0]
    order = observed + [batch for batch in own if batch % stride]
    passes = [order[start : start + size] for start in range(0, len(order), size)]
    names = [
        runner.family.block_prefix(index) + name
        for index in range(runner.family.num_layers)
        for name in guided_modules(runner.family, index)
    ]
    squares: dict[str, dict[int, torch.Tensor]] = {name: {} for name in names}
    # All processes write into the directory, but one must make it.
    processes.main_first(work.create)
    with Progress("Measuring gradients", len(passes) * len(names), "layers", quiet=not processes.is_main) as progress:
        for number, members in enumerate(passes):
            found = work.read_gradients(processes.rank, number, members)
            if found is None:
                found = {}
                seen = [batch for batch in members if batch in observed]
                outputs = _Outputs(work, processes.rank, observed[: number * size], seen)
                for block in output_gradients(
                    runner, [batches[index] for index in members], len(seen), outputs.earlier
                ):
                    for module, parts in block.squares.items():
                        found[runner.family.block_prefix(block.index) + module] = torch.cat(parts).numpy()
                        progress.update()
                    outputs.write(block)
                work.write_gradients(processes.rank, number, members, found)
            else:
                progress.skip(len(names))
            sizes = [batches[index].numel() for index in members]
            for name in names:
                squares[name].update(zip(members, torch.from_numpy(found[name]).split(sizes), strict=True))
    return Guidance(squares, processes, work)


class _Outputs:
    """The output Hessians over a pass's batches and those of earlier passes, in the work directory."""

    def __init__(self, work: WorkDir, rank: int, earlier: list[int], batches: list[int]) -> None:
        self._work, self._rank, self._earlier, self._batches = work, rank, earlier, batches
        self._done = False

    def earlier(self, index: int) -> dict[str, OutputHessian]:
        """Return those of block `index` over the earlier batches."""
        arrays, known = self._work.read_outputs(self._rank, index)
        # A run that was interrupted in this pass has added its batches to some blocks.
        self._done = known == self._earlier + self._batches
        layers = {key.rpartition(".")[0] for key in arrays} if self._earlier and not self._done else ()
        return {layer: OutputHessian.from_arrays(arrays, layer) for layer in layers}

    def write(self, block: BlockGradients) -> None:
        """Keep those of a block, which `earlier` was asked for last."""
        if self._batches and not self._done:
            arrays: dict[str, Any] = {}
            for layer, hessian in block.hessians.items():
                arrays |= hessian.to_arrays(layer)
            self._work.write_outputs(self._rank, block.index, self._earlier + self._batches, arrays)
