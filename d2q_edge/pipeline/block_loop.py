"""Quantize a model block by block, for the inputs that the layers will really see.

The calibration tokens run through the original and the quantized model side by side. For every block: load it, scale
its columns (DSQ), and for every linear group collect the statistics of its input, solve (GPTAQ and coordinate descent)
and apply; correct the next norm (DAC); move both models' hidden states on; tune the block, where that is asked for;
save. What follows the last block, final norm and lm_head, is treated alike.

Only the hidden states, one block twice, and the statistics of one group are in memory at a time. Rotation has happened
before: it changes the weights that the runner loads. Refinement of the whole model comes after: it needs all blocks.
"""

from collections.abc import Mapping
from itertools import zip_longest

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from d2q_edge.calibration.hidden_states import DTYPE, StreamPair
from d2q_edge.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from d2q_edge.formats.quantized_block import QuantizedBlock
from d2q_edge.model.blocks import BlockRunner
from d2q_edge.options import Options
from d2q_edge.pipeline.block_refinement import refine_block
from d2q_edge.pipeline.column_scaling import absorb_scales, output_hessians, scale_columns
from d2q_edge.pipeline.context import Context
from d2q_edge.pipeline.group_statistics import sublayer_statistics
from d2q_edge.pipeline.guidance import measure_guidance
from d2q_edge.pipeline.kept_inputs import KeptInputs
from d2q_edge.pipeline.memory import GRADIENT_STATES, MemoryPlan
from d2q_edge.pipeline.norm_correction import advance_quantized, quantize_final
from d2q_edge.pipeline.progress import BlockProgress
from d2q_edge.pipeline.report import Report
from d2q_edge.pipeline.solver import GroupSolver
from d2q_edge.pipeline.validation import validate
from d2q_edge.pipeline.work_dir import BlockWriter, WorkDir
from d2q_edge.quantize.matmul import matmul_precision

BATCH_TOKENS = 4096
"""Tokens per forward pass. It decides a little of the result: DAC's validation counts in batches."""


def quantize_blocks(
    runner: BlockRunner,
    types: Mapping[str, str],
    windows: npt.NDArray[np.int64],
    work: WorkDir,
    options: Options,
    *,
    validation: npt.NDArray[np.int64] | None = None,
    memory: MemoryPlan | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
    batch_tokens: int = BATCH_TOKENS,
    dtype: torch.dtype = DTYPE,
    refine_blocks: bool = False,
) -> Report:
    """Quantize all blocks, and keep each in `work` as soon as it is finished.

    Args:
        runner: of the checkpoint.
        types: tensor type of every linear layer's weight, by full name.
        windows: calibration tokens, int64 [windows, context].
        work: keeps finished blocks; those that it has already are applied and not quantized again.
        options: alpha, descent_rounds, dsq and dac count here.
        validation: more windows, which don't influence the result; it is measured on them.
        memory: where hidden states are kept, and how many; None is the host's memory, which has enough.
        processes: that share the work; all of them call this.
        batch_tokens: tokens per forward pass.
        dtype: of the hidden states between blocks.
        refine_blocks: tune every block as soon as it is quantized.

    Raises:
        D2QError: a weight or an activation is NaN or infinite, or a block can't be saved.
    """
    family, place = runner.family, memory.place if memory else torch.device("cpu")
    last = family.num_layers
    # Before the first process writes anything.
    finished = [work.has_block(index) for index in range(last + 1)]
    processes.barrier()
    with (
        BlockProgress(family, types, quiet=not processes.is_main) as progress,
        BlockWriter(work, active=processes.is_main) as writer,
        torch.inference_mode(),
        matmul_precision("high"),
    ):
        report, guidance = Report(runner.device), None
        if options.guidance and not all(finished[:last]):
            # Before there are other hidden states in memory.
            with report.timed("gradients"):
                most = memory.gradients if memory else GRADIENT_STATES
                guidance = measure_guidance(runner, windows, batch_tokens, most, work, processes)
        streams = StreamPair(runner, windows, batch_tokens, place, processes, dtype)
        validation_streams = None
        if validation is not None and len(validation):
            validation_streams = StreamPair(runner, validation, batch_tokens, place, processes, dtype)
        context = Context(runner, streams, processes, report, guidance, KeptInputs(memory.inputs if memory else None))
        solver = GroupSolver(runner.device, options.alpha, options.descent_rounds, processes)
        for index in range(last):
            original = runner.load(index)
            if finished[index]:
                result = work.read_block(index)
                quantized = _replay(context, index, original, result)
                progress.skip_block(index)
            else:
                inputs = streams.quantized.copy() if refine_blocks else None
                result, quantized = _quantize_block(context, index, original, types, solver, options, progress)
                if inputs is not None:
                    with report.timed("refinement"):
                        result, quantized = refine_block(
                            context, index, inputs, original, result, searches=solver.searches, seed=options.seed
                        )
                writer.write(index, result)
                progress.finish_block(index, result.metrics.layer_errors)
            if validation_streams is not None:
                with report.timed("validation"):
                    validation_streams.advance(index, original, quantized)
            report.add_block(family.block_prefix(index), result)
        if finished[last]:
            final = work.read_block(last)
        else:
            final = quantize_final(context, options)
            writer.write(last, final)
        report.add_block("", final)
        if validation_streams is not None:
            report.validation = validate(validation_streams, final, processes)
    processes.barrier()
    return report


def _quantize_block(
    context: Context,
    index: int,
    original: nn.Module,
    types: Mapping[str, str],
    solver: GroupSolver,
    options: Options,
    progress: BlockProgress,
) -> tuple[QuantizedBlock, nn.Module]:
    """Quantize one block, and move both models' hidden states past it; return the result and the quantized module."""
    family, result = context.family, QuantizedBlock()
    layer_types = {layer: types[f"{family.block_prefix(index)}{layer}.weight"] for layer in family.block_linears(index)}
    if options.dsq:
        result.update(scale_columns(context, index, original))
    with context.report.timed("solve"):
        hessians = output_hessians(context, index, result.column_scales)
    quantized = context.runner.share(original)
    sublayers = family.block_sublayers(index)
    for sublayer, following in zip_longest(sublayers, sublayers[1:]):
        for group, statistics in sublayer_statistics(context, index, sublayer, original, quantized):
            weights = {layer: quantized.get_submodule(layer).get_parameter("weight") for layer in group.linears}
            with context.report.timed("solve"):
                solved = solver.solve(weights, layer_types, statistics, hessians.get(group.linears[0]))
                solved.apply(quantized)
            result.update(solved)
            progress.add_layers(index, solved.metrics.layer_errors)
        next_norm = following.norm if following is not None and options.dac else None
        correction = advance_quantized(context, index, sublayer, original, quantized, next_norm)
        correction.apply(quantized)
        result.update(correction)
    return result, quantized


def _replay(context: Context, index: int, original: nn.Module, result: QuantizedBlock) -> nn.Module:
    """Apply a finished block, and move both models' hidden states past it by the same steps as when it was made."""
    scales = {layer: torch.from_numpy(s).to(context.device) for layer, s in result.column_scales.items()}
    absorb_scales(context.family, index, original, scales)
    quantized = context.runner.share(original)
    result.apply(quantized)
    context.streams.advance(index, original, quantized)
    return quantized
