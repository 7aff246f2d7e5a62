"""Tune one quantized block against the original's outputs, before the next block is quantized.

Block-AP of EfficientQAT (arXiv 2407.11062), after BRECQ (arXiv 2102.05426): scales, codes and norms of a block are
tuned by gradient descent on the squared error of its output. Its inputs are those of the quantized model, its targets
the outputs of the original model, so that the block also learns to undo what went wrong before it. Only one block's
gradients are in memory, and experts are tuned like other layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from d2q_edge.calibration.hidden_states import HiddenStates
from d2q_edge.calibration.output_gradients import deterministic, guided_modules
from d2q_edge.formats.quantized_block import QuantizedBlock
from d2q_edge.pipeline.context import Context
from d2q_edge.pipeline.tunable_block import TunableBlock
from d2q_edge.quantize.codebook_search import Searches
from d2q_edge.quantize.matmul import matmul_precision
from d2q_edge.quantize.refine import Schedule, tune

SCHEDULE = Schedule(passes=2, batch=2)
"""What counts is the number of steps, where the text is short; see docs/accuracy.md."""
MICRO_TOKENS = 4096
"""Tokens of a forward pass at most."""


def refine_block(
    context: Context,
    index: int,
    inputs: HiddenStates,
    original: nn.Module,
    result: QuantizedBlock,
    *,
    searches: Searches | None = None,
    schedule: Schedule | None = None,
    seed: int = 0,
) -> tuple[QuantizedBlock, nn.Module]:
    """Tune a quantized block, and move the quantized model's hidden states past it once more.

    Args:
        context: hidden states of both models behind the block.
        index: number of the block.
        inputs: the quantized model's hidden states in front of the block; they become those behind it.
        original: the original block, its column scales absorbed.
        result: what quantizing it gave.
        searches: on the computing device; None makes them.
        schedule: of the tuning; None is SCHEDULE.
        seed: of the order of the windows.

    Returns:
        The tuned block, with its errors before and after as metrics, and its module.
    """
    streams, runner = context.streams, context.runner
    with torch.inference_mode(False), deterministic(context.device), matmul_precision("high"):
        searches = searches or Searches(context.device)
        block = TunableBlock(runner, index, _copy(context, original, result), result, searches)
        objective = _OutputError(context, index, inputs, block)
        losses = tune(
            objective,
            block.layers(),
            len(objective),
            seed + index,
            schedule=schedule or SCHEDULE,
            group=context.processes,
            capture=runner.capturable and context.processes.world_size == 1,
            quiet=True,
        )
        tuned = block.result()
    tuned.metrics.output_errors = [losses.before, losses.after]
    quantized = runner.share(original)
    tuned.apply(quantized)
    streams.quantized = inputs
    streams.advance_quantized(index, quantized)
    return tuned, quantized


class _OutputError:
    """The squared error of a window's outputs, relative to the mean square of all windows' outputs themselves."""

    def __init__(self, context: Context, index: int, inputs: HiddenStates, block: TunableBlock) -> None:
        streams, length = context.streams, inputs.context
        self._inputs, self._targets, self._block = inputs, streams.original, block
        self._places = [(batch, number) for batch, size in enumerate(streams.sizes) for number in range(size)]
        self._own, self._micro = frozenset(streams.own), max(1, MICRO_TOKENS // length)
        weights = _token_weights(context, index)
        self._weights = {
            batch: (weights[batch] if weights else torch.ones(streams.sizes[batch] * length))
            .to(context.device)
            .view(-1, length)
            for batch in self._own
        }
        self._parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._count = 0
        square = torch.zeros((), dtype=torch.float64)
        for batch, own in self._weights.items():
            tokens = context.runner.stream(self._targets[batch]).square().mean(-1) * own
            square += tokens.mean(1).sum(dtype=torch.float64).cpu()
        context.processes.all_reduce([square])
        self._unit = max(float(square) / len(self._places), torch.finfo(torch.float32).tiny)

    def __len__(self) -> int:
        return len(self._places)

    @torch.no_grad()
    def loss(self, items: Sequence[int]) -> float:
        own = self._own_places(items)
        parts = [own[start : start + self._micro] for start in range(0, len(own), self._micro)]
        return sum(float(self._error(*self._read(part))) for part in parts)

    def prepare(self, items: Sequence[int]) -> None:
        own = self._own_places(items)
        parts = [self._read(own[start : start + self._micro]) for start in range(0, len(own), self._micro)]
        same = [[one.shape for one in part] for part in parts] == [[one.shape for one in part] for part in self._parts]
        if same:
            for kept, part in zip(self._parts, parts, strict=True):
                for old, new in zip(kept, part, strict=True):
                    old.copy_(new)
        else:
            self._parts = parts
        self._count = len(items)

    def backward(self) -> None:
        for part in self._parts:
            with torch.enable_grad():
                (self._error(*part) / self._count).backward()

    def _own_places(self, items: Sequence[int]) -> list[tuple[int, int]]:
        """Return where this process's share of the items is: batch, and number in it."""
        return [self._places[item] for item in items if self._places[item][0] in self._own]

    def _read(self, places: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return inputs, targets and weights of windows, the weights float32 [windows, context]."""
        inputs, targets = (
            torch.cat([states.window(*place) for place in places]) for states in (self._inputs, self._targets)
        )
        return inputs, targets, torch.stack([self._weights[batch][number] for batch, number in places])

    def _error(self, inputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        stream = self._block.runner.stream
        off = (stream(self._block.forward(inputs)) - stream(targets)).square().mean(-1)
        return (off * weights).mean(1).sum() / self._unit


def _token_weights(context: Context, index: int) -> Mapping[int, torch.Tensor]:
    """Return how much the loss depends on the block's output, token by token; nothing without guidance."""
    if context.guidance is None:
        return {}
    last = guided_modules(context.family, index)[-1]
    return context.guidance.weights(context.family.block_prefix(index), (last,))


def _copy(context: Context, original: nn.Module, result: QuantizedBlock) -> nn.Module:
    """Copy a block's module, and the tensors that stay: those made in inference mode can't take part in backward."""
    module = context.runner.share(original)
    replaced = {f"{layer}.weight" for layer in result.weights}
    for name, parameter in list(module.named_parameters()):
        if name not in replaced:
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, nn.Parameter(parameter.detach().clone(), requires_grad=False))
    for name, buffer in list(module.named_buffers()):
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, buffer.clone())
    return module
