"""Correct the mean shift of norms with a bias (DAC, D2Quant section 3.3), as the quantized model's stream moves on."""

from dataclasses import asdict

import torch
from torch import nn

from d2q_edge.formats.quantized_block import QuantizedBlock, float_array
from d2q_edge.model.families import Family, Sublayer
from d2q_edge.options import Options
from d2q_edge.pipeline.column_scaling import ENERGY_BATCH_STRIDE
from d2q_edge.pipeline.context import Context, FiniteCheck
from d2q_edge.quantize.dac import MeanShift
from d2q_edge.quantize.dsq import InputEnergy, column_scales

HEAD_ROWS = 8192
"""Rows of the lm_head at a time."""


def corrected_norms(family: Family, options: Options) -> list[str]:
    """Return the full names of the norms that may get a bias: those after a quantized sublayer, and the final one."""
    if not options.dac:
        return []
    blocks = [
        f"{family.block_prefix(index)}{sublayer.norm}"
        for index in range(family.num_layers)
        for sublayer in family.block_sublayers(index)[1:]
        if sublayer.norm is not None
    ]
    return [*blocks, family.final_norm]


def advance_quantized(
    context: Context, index: int, sublayer: Sublayer, original: nn.Module, quantized: nn.Module, next_norm: str | None
) -> QuantizedBlock:
    """Move the quantized model's hidden states past a sublayer, and correct the norm that reads them next.

    The bias of `next_norm` is the mean of its output after the original sublayer less that after the quantized one,
    both given the same input.

    Args:
        context, index: hidden states in front of the sublayer, number of the block.
        sublayer: of the block, quantized completely.
        original, quantized: the block and its copy.
        next_norm: the norm to correct; None corrects nothing.

    Returns:
        The norm's bias, where held-out calibration batches confirm it, and the statistics of its shift.

    Raises:
        D2QError: activations are NaN or infinite.
    """
    runner, streams = context.runner, context.streams
    shift = MeanShift(context.family.hidden_size, len(streams)) if next_norm is not None else None
    check = FiniteCheck(context.device)
    for batch in streams.own:
        hidden = streams.quantized[batch]
        with context.report.timed("forward"):
            kept = context.kept.take(batch)
            if kept is None:
                moved = runner.sublayer_forward(quantized, sublayer, hidden)
            else:
                moved = runner.finish_sublayer(quantized, sublayer, *kept, hidden)
            if shift is not None and next_norm is not None:
                wanted = runner.sublayer_forward(original, sublayer, hidden)
                normed = [runner.normed(quantized, next_norm, states) for states in (wanted, moved)]
                shift.add_batch(batch, *normed)
        streams.quantized[batch] = moved
        check.add(moved)
    check.require("quantized", f"{context.family.block_prefix(index)}{sublayer.module}")
    result = QuantizedBlock()
    if shift is not None and next_norm is not None:
        context.processes.all_reduce([shift.moments])
        _record(result, next_norm, shift, None)
    return result


def quantize_final(context: Context, options: Options) -> QuantizedBlock:
    """Correct the final norm, and find column scales for the lm_head, which is encoded when the file is written."""
    runner, streams, family = context.runner, context.streams, context.family
    norm = runner.final_norm()
    energy = InputEnergy(family.hidden_size, context.device)
    shift = MeanShift(family.hidden_size, len(streams))
    for batch in streams.own:
        outputs = norm(runner.stream(streams.original[batch]))
        if batch % ENERGY_BATCH_STRIDE == 0:
            energy.add_batch(outputs)
        shift.add_batch(batch, outputs, norm(runner.stream(streams.quantized[batch])))
    result = QuantizedBlock()
    weight = norm.get_parameter("weight")
    scales = torch.ones_like(weight)
    if options.dsq and not family.tied_embeddings:
        context.processes.all_reduce(energy.sums)
        head = runner.checkpoint.tensor(f"{family.head}.weight")
        weights = sum(part.to(context.device).float().square().sum(0) for part in head.split(HEAD_ROWS))
        scales = column_scales(weights, energy.conditional())
        result.column_scales[family.head] = float_array(scales)
        scaled = (weight + family.norm_offset) * scales - family.norm_offset
        result.floats[f"{family.final_norm}.weight"] = float_array(scaled)
    if options.dac:
        context.processes.all_reduce([shift.moments])
        _record(result, family.final_norm, shift, scales)
    return result


def _record(result: QuantizedBlock, norm: str, shift: MeanShift, scales: torch.Tensor | None) -> None:
    """Add a norm's bias, multiplied by the scales that the norm absorbed, and the statistics of its shift."""
    result.metrics.norm_shifts[norm] = asdict(shift.stats())
    bias = shift.bias()
    if bias is not None:
        result.norm_biases[norm] = float_array(bias if scales is None else bias.to(scales) * scales)
