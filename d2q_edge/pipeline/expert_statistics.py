"""Collect the input statistics of experts: every expert is quantized for its own tokens.

The original model's router decides which tokens these are, in both models: an expert's statistics must compare the same
tokens (quantize/routing.py tops up experts that see few). Experts are handled as many at a time as MEMORY holds the
statistics of; for each such chunk both models' hidden states pass twice, once for gate and up, once for down, which
reads what the quantized gate and up put out.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from d2q_edge.model.experts import Expert
from d2q_edge.model.families import Family, LinearGroup, RoutedExperts, Sublayer
from d2q_edge.pipeline.context import Context, check_sums
from d2q_edge.quantize.routing import MINIMUM_TOKENS_PER_CHANNEL, top_up
from d2q_edge.quantize.statistics import InputStatistics

MEMORY = 2**30
"""Bytes of statistics at a time."""


def expert_statistics(
    context: Context,
    index: int,
    sublayer: Sublayer,
    experts: RoutedExperts,
    original: nn.Module,
    quantized: nn.Module,
) -> Iterator[tuple[LinearGroup, InputStatistics]]:
    """Yield the linear groups of all experts with their statistics, see `group_statistics.sublayer_statistics`.

    `experts` are those of the sublayer.
    """
    family = context.family
    tokens = _choose_tokens(context, sublayer, experts, original)
    prefix = family.block_prefix(index)
    # An expert's tokens count by the gradient of what all experts together put out.
    weights = context.guidance.weights(prefix, (sublayer.module,)) if context.guidance else {}
    for chunk in _chunks(family):

        def collect(columns: int, inputs_of: Callable[[Expert, torch.Tensor], torch.Tensor]) -> list[InputStatistics]:
            batches = context, sublayer, experts, original, quantized, chunk, tokens, weights  # noqa: B023
            return _collect(*batches, columns, inputs_of)

        found = collect(family.hidden_size, lambda _, inputs: inputs)
        for number in chunk:
            yield experts.groups(number)[0], found.pop(0)
        found = collect(family.linear_shape(index, experts.linears(chunk[0])[2])[1], Expert.gated)
        for number in chunk:
            yield experts.groups(number)[1], found.pop(0)


def statistics_bytes(family: Family) -> int:
    """Return the memory for the statistics of a chunk of experts; zero without experts."""
    return max(len(chunk) for chunk in _chunks(family)) * _expert_bytes(family) if family.num_experts else 0


def routing_bytes(family: Family, tokens: int) -> int:
    """Return the host memory that it takes to choose the experts' tokens among so many."""
    # Probabilities and routes as float32; routes and choices as bool, twice while they are made.
    return tokens * family.num_experts * (2 * 4 + 4)


def _choose_tokens(
    context: Context, sublayer: Sublayer, experts: RoutedExperts, original: nn.Module
) -> dict[int, torch.Tensor]:
    """Choose every expert's tokens: for every batch of this process, bool [tokens, experts] on the CPU."""
    family, streams = context.family, context.streams
    sizes = [streams.original.tokens(index) for index in range(len(streams))]
    probabilities = torch.zeros(sum(sizes), family.num_experts)
    routed = torch.zeros_like(probabilities)
    batches = zip(probabilities.split(sizes), routed.split(sizes), strict=True)
    for index, (likely, taken) in enumerate(batches):
        if index in streams.own:
            with context.report.timed("forward"):
                logits, chosen = context.runner.routes(original, sublayer, experts.router, streams.original[index])
            likely.copy_(logits.float().softmax(-1))
            taken.scatter_(1, chosen.cpu(), 1.0)
    # Every process fills in its own tokens, so that all choose the same.
    context.processes.all_reduce([probabilities, routed])
    tokens = top_up(probabilities, routed.bool(), MINIMUM_TOKENS_PER_CHANNEL * family.hidden_size)
    return {index: batch for index, batch in enumerate(tokens.split(sizes)) if index in streams.own}


def _collect(
    context: Context,
    sublayer: Sublayer,
    experts: RoutedExperts,
    original: nn.Module,
    quantized: nn.Module,
    chunk: list[int],
    tokens: dict[int, torch.Tensor],
    weights: dict[int, torch.Tensor],
    columns: int,
    inputs_of: Callable[[Expert, torch.Tensor], torch.Tensor],
) -> list[InputStatistics]:
    """Collect the statistics of what `inputs_of` makes of an expert and its tokens, for every expert of a chunk."""
    found = [InputStatistics(columns, context.device) for _ in chunk]
    for index in context.streams.own:
        with context.report.timed("forward"):
            x_original = _inputs(original, sublayer, context.streams.original[index])
            x_quantized = _inputs(quantized, sublayer, context.streams.quantized[index])
            chosen = tokens[index][:, chunk].to(context.device)
            weight = weights[index].to(context.device) if weights else None
        with context.report.timed("statistics"):
            for statistics, number, own in zip(found, chunk, chosen.unbind(1), strict=True):
                inputs = inputs_of(_expert(quantized, experts, number), x_quantized[own])
                wanted = inputs_of(_expert(original, experts, number), x_original[own])
                statistics.add_batch(inputs, wanted, None if weight is None else weight[own])
    for statistics, number in zip(found, chunk, strict=True):
        context.processes.all_reduce(statistics.sums)
        check_sums(statistics.sums, f"{experts.prefix}{number}")
    return found


def _inputs(block: nn.Module, sublayer: Sublayer, residual: torch.Tensor) -> torch.Tensor:
    """Return what router and experts read: float32 [tokens, hidden]."""
    inputs: torch.Tensor = residual if sublayer.norm is None else block.get_submodule(sublayer.norm)(residual)
    return inputs.flatten(0, -2)


def _chunks(family: Family) -> list[list[int]]:
    """Split the experts' numbers into chunks whose statistics fit into MEMORY."""
    size = max(1, MEMORY // _expert_bytes(family))
    return [list(range(family.num_experts))[start : start + size] for start in range(0, family.num_experts, size)]


def _expert_bytes(family: Family) -> int:
    """Return the memory for the statistics of one expert: H and dXXT, float32."""
    found = ((index, family.block_experts(index)) for index in range(family.num_layers))
    index, first = next((index, experts) for index, experts in found if experts is not None)
    columns = max(family.linear_shape(index, layer)[1] for layer in first.linears(0))
    return 2 * 4 * columns**2


def _expert(block: nn.Module, experts: RoutedExperts, number: int) -> Expert:
    expert = block.get_submodule(f"{experts.prefix}{number}")
    if not isinstance(expert, Expert):
        raise TypeError(f"expert {number} is a {type(expert).__name__}")
    return expert
