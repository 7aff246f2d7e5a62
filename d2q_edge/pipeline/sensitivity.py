"""Measure how much the model suffers from the rounding of each linear layer.

For every layer, or stack of experts: the KL divergence of the next-token distributions from the original model's, on a
few calibration windows, when its weight alone is rounded to nearest in a given tensor type. Small errors of different
layers add up well, so that these numbers can be compared and summed (allocation.py).

Only the blocks from the changed one on are run, and every block is loaded once per pass: all variants of the hidden
states, one for each layer already passed, go through it together. A pass takes as many windows as fit into
memory.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from d2q_edge.formats import tensor_types
from d2q_edge.model.blocks import BlockRunner
from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.kl_divergence import cap_logits, kl_divergence
from d2q_edge.quantize.matmul import with_float64
from d2q_edge.quantize.rtn import round_layer
from d2q_edge.utils.progress import Progress

WINDOWS = 4
"""Number of windows that are measured. On qwen3-34m, windows of 512 tokens, the numbers from four windows differ from
those from sixteen by 6 %, in the mean over the layers and less a common factor (one window 10 %, eight 5 %); per
weight, the layers differ by a factor of 50."""
MEMORY = 2**31
"""Bytes of hidden states in one pass."""
LOGITS = 2**28
"""Bytes of one piece of logits."""


def choose_windows(windows: npt.NDArray[np.int64], count: int = WINDOWS) -> npt.NDArray[np.int64]:
    """Choose at most `count` windows, evenly spread over all of them: [windows, context]."""
    chosen = np.linspace(0, len(windows) - 1, min(count, len(windows))).round().astype(np.int64)
    return windows[chosen]


def measure(runner: BlockRunner, types: Mapping[str, str], windows: npt.NDArray[np.int64]) -> dict[str, float]:
    """Measure the sensitivity of layers.

    Args:
        runner: of the model.
        types: full name of a linear layer's weight, or of a stack of them, to the type that it is rounded to; one of
            tensor_types.BY_NAME.
        windows: token ids [windows, context].

    Returns:
        Name to mean KL divergence, in nats per token, in the order of `types`. The same input on the same machine gives
        the same numbers.

    Raises:
        D2QError: a weight can't be read, or is NaN or infinite.
    """
    per_window = (len(types) + 1) * windows.shape[1] * runner.family.stream_width * 4
    passes = np.array_split(windows, min(len(windows), max(1, -(-len(windows) * per_window // MEMORY))))
    totals = dict.fromkeys(types, 0.0)
    blocks = runner.family.num_layers
    with (
        torch.inference_mode(),
        Progress("Measuring sensitivity", blocks * len(passes), "block") as progress,
    ):
        rounding = _Rounding(types, runner.device)
        for part in passes:
            variants = _run(runner, rounding, part, progress)
            for name, divergence in _divergences(runner, variants).items():
                totals[name] += divergence * part.size
    return {name: total / windows.size for name, total in totals.items()}


class _Rounding:
    """Rounds weights, and keeps them packed for later passes: searching takes longer than running."""

    def __init__(self, types: Mapping[str, str], device: torch.device) -> None:
        self.types = types
        self._searches = {kind: CodebookSearch(tensor_types.BY_NAME[kind], device) for kind in {*types.values()}}
        self._packed: dict[str, tensor_types.U8] = {}

    def __call__(self, name: str, kind: str, weights: torch.Tensor) -> torch.Tensor:
        """Return the rounded weight called `name`, in type `kind`."""
        own = tensor_types.BY_NAME[kind]
        if name not in self._packed:
            self._packed[name] = round_layer(weights, self._searches[kind]).pack(own)
        return torch.from_numpy(tensor_types.dequantize(own, self._packed[name])).to(weights.device)


def _run(
    runner: BlockRunner, rounding: _Rounding, windows: npt.NDArray[np.int64], progress: Progress
) -> dict[str, torch.Tensor]:
    """Return the last block's outputs [windows, context, hidden]: the original's under "", variants' by their layer."""
    states = {"": runner.embed(torch.from_numpy(windows)).cpu()}
    for index in range(runner.family.num_layers):
        block = runner.load(index)
        variants = {
            name: _forward(runner, _rounded(runner, block, name, rounding), states[""])
            for name in rounding.types
            if runner.family.block_of(name) == index
        }
        for name, hidden in states.items():
            states[name] = _forward(runner, block, hidden)
        states.update(variants)
        progress.update()
    return states


def _rounded(runner: BlockRunner, block: nn.Module, name: str, rounding: _Rounding) -> nn.Module:
    """Return a copy of the block with one layer, or one stack of them, rounded."""
    variant = runner.share(block)
    for part in runner.family.stacks.get(name, (name,)):
        layer = variant.get_submodule(runner.family.split_name(part)[1].removesuffix(".weight"))
        weight = rounding(part, rounding.types[name], layer.get_parameter("weight"))
        layer.weight = nn.Parameter(weight, requires_grad=False)
    return variant


def _forward(runner: BlockRunner, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Run all windows through a block, one at a time; the result is on the CPU."""
    return torch.cat([runner.forward(block, window.to(runner.device)).cpu() for window in hidden.split(1)])


def _divergences(runner: BlockRunner, states: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the mean KL divergence of every variant from the original."""
    norm, head, cap = runner.final_norm(), runner.head(), runner.family.logit_cap
    step = max(1, LOGITS // (4 * len(head)))
    flat = {name: runner.stream(hidden).flatten(0, 1).split(step) for name, hidden in states.items()}
    sums = dict.fromkeys((name for name in states if name), 0.0)
    for piece, hidden in enumerate(flat[""]):
        expected = cap_logits(norm(hidden.to(runner.device)) @ head.T, cap).log_softmax(1)
        for name in sums:
            found = cap_logits(norm(flat[name][piece].to(runner.device)) @ head.T, cap).log_softmax(1)
            sums[name] += float(with_float64(kl_divergence(expected, found)).sum(dtype=torch.float64))
    tokens = states[""].shape[0] * states[""].shape[1]
    return {name: total / tokens for name, total in sums.items()}
