"""Weight the calibration tokens by the original model's gradients: guided Hessians.

GuidedQuant (arXiv 2505.07004): a token counts in a layer's H and dXXT by the squared gradient of the loss at the
layer's output (calibration/output_gradients.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from d2q_edge.calibration.output_gradients import guided_modules, kept_bytes, squared_output_gradients
from d2q_edge.distributed.process_group import ProcessGroup
from d2q_edge.model.blocks import BlockRunner
from d2q_edge.pipeline.work_dir import WorkDir
from d2q_edge.utils.progress import Progress

POWER = 0.5
CLIP = 50.0
"""Squared gradients are clipped at so many times their mean, and then raised to POWER."""
PASS_TOKENS = 16384
"""Tokens between two saves, at most, where loading the blocks once more costs little of the time."""

TINY = torch.finfo(torch.float32).tiny

Weights = Mapping[str, Mapping[int, torch.Tensor]]


class Guidance:
    """Weights of this process's calibration tokens."""

    def __init__(self, squares: Weights, processes: ProcessGroup) -> None:
        """Take the squared gradients by module and batch, float32 [tokens], of all tokens of this process."""
        self._squares, self._processes = squares, processes

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
    """Measure the squared gradients of all calibration tokens, some batches at a time; each pass is kept in `work`.

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
    passes = [own[start : start + size] for start in range(0, len(own), size)]
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
            found = work.read_gradients(processes.rank, number, list(members))
            if found is None:
                found = {}
                for name, parts in squared_output_gradients(runner, [batches[index] for index in members]):
                    found[name] = torch.cat(parts).numpy()
                    progress.update()
                work.write_gradients(processes.rank, number, list(members), found)
            else:
                progress.skip(len(names))
            sizes = [batches[index].numel() for index in members]
            for name in names:
                squares[name].update(zip(members, torch.from_numpy(found[name]).split(sizes), strict=True))
    return Guidance(squares, processes)
