"""Collect the input statistics of a sublayer's linear groups, in both models: H = 2/n X^T X, dXXT = 2/n (X~ - X)^T X.

The inputs X~ come from the original model; the inputs X come from the quantized one, in which all earlier layers are
quantized already. So the statistics of a group can only be collected when the groups before it are solved and applied:
these functions are generators, and the block loop solves and applies each group before it asks for the next.
"""

from collections.abc import Iterator

from torch import nn

from d2q_edge.model.families import LinearGroup, Sublayer
from d2q_edge.model.families.experts import dense_groups
from d2q_edge.pipeline.context import Context, FiniteCheck, check_sums
from d2q_edge.pipeline.expert_statistics import expert_statistics
from d2q_edge.quantize.statistics import InputStatistics

GroupStatistics = Iterator[tuple[LinearGroup, InputStatistics]]


def sublayer_statistics(
    context: Context, index: int, sublayer: Sublayer, original: nn.Module, quantized: nn.Module
) -> GroupStatistics:
    """Yield every linear group of a sublayer with the statistics of its input.

    When the iterator is exhausted, the original model's hidden states are past the sublayer.

    Args:
        context, index: hidden states in front of the sublayer, number of the block.
        sublayer: of the block, dense or with experts, or both.
        original, quantized: the block and its copy, in which the caller replaces the weights of each group.

    Raises:
        D2QError: activations are NaN or infinite, or too large.
    """
    family, experts = context.family, context.family.block_experts(index)
    routed = experts is not None and experts.module == sublayer.module
    own = {layer for group in family.sublayer_groups(index, sublayer) for layer in group.linears}
    groups = [group for group in dense_groups(family, index) if group.linears[0] in own]
    for group in groups:
        advance = group is groups[-1] and not routed
        yield group, _dense_statistics(context, index, sublayer, group, original, quantized, advance=advance)
    if experts is not None and routed:
        yield from expert_statistics(context, index, sublayer, experts, original, quantized)
        _advance_original(context, index, sublayer, original)


def _dense_statistics(
    context: Context,
    index: int,
    sublayer: Sublayer,
    group: LinearGroup,
    original: nn.Module,
    quantized: nn.Module,
    *,
    advance: bool,
) -> InputStatistics:
    """Collect one group's statistics; with `advance` the same pass moves the original's hidden states on."""
    runner, streams, layer = context.runner, context.streams, group.linears[0]
    statistics = InputStatistics(context.family.linear_shape(index, layer)[1], context.device)
    check = FiniteCheck(context.device)
    prefix = context.family.block_prefix(index)
    name = f"{prefix}{layer}"
    weights = context.guidance.weights(prefix, group.linears) if context.guidance else {}
    last = advance and group.norm is None and runner.puts_out(original, sublayer, layer)
    context.kept.begin(layer)
    for batch in streams.own:
        hidden = streams.original[batch]
        with context.report.timed("forward"):
            if advance:
                inputs, moved = runner.sublayer_trace(original, sublayer, (layer,), hidden)
                x_original, streams.original[batch] = inputs[layer], moved
                check.add(moved)
            else:
                x_original = runner.group_input(original, sublayer, group, hidden)
            x_quantized = runner.group_input(quantized, sublayer, group, streams.quantized[batch])
        with context.report.timed("statistics"):
            own = weights[batch].to(context.device) if weights else None
            statistics.add_batch(x_quantized, x_original, own)
        if last:
            context.kept.keep(batch, x_quantized)
    check.require("original", name)
    context.processes.all_reduce(statistics.sums)
    check_sums(statistics.sums, name)
    return statistics


def _advance_original(context: Context, index: int, sublayer: Sublayer, original: nn.Module) -> None:
    check = FiniteCheck(context.device)
    for batch in context.streams.own:
        with context.report.timed("forward"):
            moved = context.runner.sublayer_forward(original, sublayer, context.streams.original[batch])
        context.streams.original[batch] = moved
        check.add(moved)
    check.require("original", f"{context.family.block_prefix(index)}{sublayer.module}")
