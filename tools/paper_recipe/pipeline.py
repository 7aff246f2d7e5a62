"""The paper's recipe for a whole model, block by block, in torch (arXiv 2602.02546).

As in the product's pipeline, the original and the quantized model run side by side, and every layer is quantized for
the output of the quantized layers before it. Rotation is a matter of the checkpoint that the BlockRunner reads.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm import tqdm

from d2q_edge.model.blocks import BlockRunner, add_bias
from d2q_edge.model.families import Family, LinearGroup
from d2q_edge.quantize.statistics import InputStatistics
from tools.paper_recipe.feedback import ALPHA, Fit, mean_shift, quantize_columns, round_groups
from tools.paper_recipe.grid import clipped_grid, dual_scale_grid, group_size
from tools.whole_model import Weights

BATCH_TOKENS = 8192
"""Tokens per forward pass."""
DUAL_SCALE_LAYER = "mlp.down_proj"
"""The layer with the paper's dual-scale grid."""


@dataclass(frozen=True)
class Recipe:
    """Which of the paper's steps are taken.

    Attributes:
        feedback: GPTQ or GPTAQ; otherwise round to nearest.
        alpha: weight of the input's error; 0 is GPTQ.
        dual_scale: DSQ for the down projections.
        correct: DAC at the post-attention norms and the final norm.
    """

    feedback: bool = True
    alpha: float = ALPHA
    dual_scale: bool = False
    correct: bool = False

    def fit(self, layer: str, bits: int) -> Fit:
        """Return the fit of a layer, named relative to its block."""
        return partial(dual_scale_grid if self._is_dual(layer) else clipped_grid, bits=bits)

    def bits_per_weight(self, family: Family, bits: int) -> float:
        """Return the mean over the blocks' linear layers, with float16 scales and minimums."""
        total = stored = 0.0
        shapes = family.tensor_shapes()
        for name in family.linear_weights():
            rows, columns = shapes[name]
            layer = family.split_name(name)[1].removesuffix(".weight")
            floats = bits if self._is_dual(layer) else 2
            total += rows * columns
            stored += rows * columns * (bits + 16 * floats / group_size(columns))
        return stored / total

    def _is_dual(self, layer: str) -> bool:
        return self.dual_scale and layer == DUAL_SCALE_LAYER


@torch.inference_mode()
def quantize_model(
    runner: BlockRunner,
    recipe: Recipe,
    bits: int,
    windows: npt.NDArray[np.int64],
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> Weights:
    """Quantize all linear layers of all blocks.

    Args:
        runner: of the checkpoint.
        recipe: the steps.
        bits: 2 or 3.
        windows: calibration tokens [windows, context].
        batch_tokens: tokens per forward pass.

    Returns:
        Dequantized weights, and biases of norms, by full name: float32 on the runner's device.

    Raises:
        D2QError: calibration statistics can't be factored.
    """
    batches = torch.from_numpy(windows).split(max(1, batch_tokens // windows.shape[1]))
    driver = _Driver(runner, recipe, bits, batches if recipe.feedback or recipe.correct else ())
    for index in tqdm(range(runner.family.num_layers), desc="Quantizing", unit="block", disable=None):
        block = runner.load(index)
        driver.quantize(index, block)
    driver.finish()
    return driver.weights


class _Driver:
    """Both streams between two blocks, as batches [windows, context, hidden]; empty if the recipe doesn't use them."""

    def __init__(self, runner: BlockRunner, recipe: Recipe, bits: int, batches: Sequence[torch.Tensor]) -> None:
        self.runner, self.recipe, self.bits = runner, recipe, bits
        self.weights: dict[str, torch.Tensor] = {}
        self.original = [runner.embed(part) for part in batches]
        self.quantized = self.original

    def quantize(self, index: int, block: nn.Module) -> None:
        """Quantize one block and move both streams past it."""
        prefix = self.runner.family.block_prefix(index)
        linear_groups = self.runner.family.block_groups(index)
        inputs, outputs = self._run_original(block, linear_groups)
        corrected = [group for group in linear_groups[1:] if group.norm is not None and self.recipe.correct]
        # The teacher: the same input as the student's, through this block before any of it is quantized.
        teachers = {group: list(self._inputs(block, group)) for group in corrected}
        for group in linear_groups:
            if group in corrected and group.norm is not None:
                shift = mean_shift(teachers.pop(group), self._inputs(block, group))
                self.weights[f"{prefix}{group.norm}.bias"] = shift
                add_bias(block.get_submodule(group.norm), shift)
            self._quantize_group(prefix, block, group, inputs.pop(group))
        self.original = outputs
        self.quantized = [self.runner.forward(block, hidden) for hidden in self.quantized]

    def finish(self) -> None:
        """Correct the final norm; its teacher is the original stream."""
        if not self.recipe.correct:
            return
        norm = self.runner.final_norm()
        shift = mean_shift(map(norm, self.original), map(norm, self.quantized))
        self.weights[f"{self.runner.family.final_norm}.bias"] = shift

    def _run_original(
        self, block: nn.Module, linear_groups: tuple[LinearGroup, ...]
    ) -> tuple[dict[LinearGroup, list[torch.Tensor]], list[torch.Tensor]]:
        """Run the original stream; return the inputs of every linear group, and the block's outputs."""
        inputs: dict[LinearGroup, list[torch.Tensor]] = {group: [] for group in linear_groups}
        outputs = []
        for hidden in self.original:
            seen, output = self.runner.trace(block, tuple(group.linears[0] for group in linear_groups), hidden)
            outputs.append(output)
            for group in linear_groups:
                inputs[group].append(seen[group.linears[0]])
        return inputs, outputs

    def _inputs(self, block: nn.Module, group: LinearGroup) -> Iterator[torch.Tensor]:
        """Yield the inputs of a linear group in the quantized stream, with the block as it is now."""
        return (self.runner.input_of(block, group.linears[0], hidden) for hidden in self.quantized)

    def _quantize_group(self, prefix: str, block: nn.Module, group: LinearGroup, original: list[torch.Tensor]) -> None:
        layers = [block.get_submodule(name) for name in group.linears]
        weights: list[torch.Tensor] = [layer.get_parameter("weight") for layer in layers]
        fit = self.recipe.fit(group.linears[0], self.bits)
        # Groups of several layers have the clipped grid, whose rows are independent.
        together = torch.cat(weights)
        if self.recipe.feedback:
            statistics = InputStatistics(together.shape[1], self.runner.device)
            for reached, wanted in zip(self._inputs(block, group), original, strict=True):
                statistics.add_batch(reached, wanted)
            together = quantize_columns(together, statistics, fit, self.recipe.alpha)
        else:
            together = round_groups(together, fit)
        parts = together.split([len(weight) for weight in weights])
        for name, layer, part in zip(group.linears, layers, parts, strict=True):
            layer.weight = nn.Parameter(part, requires_grad=False)
            self.weights[f"{prefix}{name}.weight"] = part
