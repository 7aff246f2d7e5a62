"""Plan a conversion: everything that can be decided and checked before the long work starts."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from d2q_edge.calibration.chat_template import ChatTemplate
from d2q_edge.calibration.mixture import Part, load_parts
from d2q_edge.calibration.windows import Windows, split_windows
from d2q_edge.distributed.process_group import ProcessGroup
from d2q_edge.errors import D2QError
from d2q_edge.export.model_file import model_tokenizer
from d2q_edge.export.targets import check_targets
from d2q_edge.model.adapted_checkpoint import adapted
from d2q_edge.model.blocks import BlockRunner
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import Family, family_for
from d2q_edge.model.peft_files import adapter_files, locate_adapter
from d2q_edge.model.rotated_checkpoint import RotatedCheckpoint, rotation_pays
from d2q_edge.model.tokenizer import Tokenizer
from d2q_edge.options import Options
from d2q_edge.pipeline import sensitivity
from d2q_edge.pipeline.block_loop import BATCH_TOKENS
from d2q_edge.pipeline.device import choose_device
from d2q_edge.pipeline.memory import MemoryPlan, plan_memory
from d2q_edge.pipeline.norm_correction import corrected_norms
from d2q_edge.pipeline.output import Output
from d2q_edge.pipeline.recipe import Calibration, d2q_metadata
from d2q_edge.pipeline.refinement import choose_scope, refined_norms
from d2q_edge.pipeline.type_plan import TypePlan, check_request, is_mixed, plan_types, rounding_types
from d2q_edge.runtime.source_tokenizer import source_tokenizer

FILE_TYPES = {2: 80, 3: 81}
"""general.file_type by bits, of a mixture the nearest; the patched llama.cpp calls them D2Q2 and D2Q3."""


@dataclass(frozen=True)
class Job:
    """A planned conversion.

    Attributes:
        options, output: as given.
        source, checkpoint: the checkpoint, with an adapter if there is one, and the same or rotated.
        family, tokenizer: of the checkpoint.
        types: of all tensors.
        file, size: what will be written, and its size in bytes.
        calibration, memory: None where weights are rounded to nearest.
        processes: that share the work.
        scope: what refinement tunes together, "blocks" or "model"; None without it.
    """

    options: Options
    output: Path
    source: Checkpoint
    checkpoint: Checkpoint
    family: Family
    tokenizer: Tokenizer
    types: TypePlan
    file: Output
    size: int
    calibration: Calibration | None
    memory: MemoryPlan | None
    processes: ProcessGroup
    scope: str | None = None


def plan(model: str | Path, output: str | Path, options: Options, processes: ProcessGroup | None = None) -> Job:
    """Open the checkpoint, check the request, and decide what `execute` will do; nothing is written.

    For a mixture of types this measures the layers' sensitivity, which takes a few forward passes.

    Args:
        model: a Hugging Face model directory, or an id of the hub.
        output: the file that will be written.
        options: what to do.
        processes: that share the work; None finds out.

    Raises:
        D2QError: anything wrong with the checkpoint, the options, the text, the device, or too little memory or disk.
    """
    output = Path(output)
    processes = processes or ProcessGroup.from_environment(choose_device(options.device))
    options.check()
    if options.adapter is not None:
        options = replace(options, adapter=str(locate_adapter(options.adapter)))
    source = Checkpoint.open(model)
    parts = load_parts(options.calibration) if options.calibrate else ()
    read = [part.path for part in parts if part.path is not None]
    read += [] if options.adapter is None else adapter_files(options.adapter)
    check_targets({"the output": output}, source.directory, read)
    source.check(family_for(source.config).tensor_shapes())
    source = adapted(source, options.adapter)
    family = family_for(source.config)
    rotated = options.rotation == "on" or (options.rotation == "auto" and rotation_pays(family))
    checkpoint = RotatedCheckpoint(source, options.seed) if rotated else source
    family = family_for(checkpoint.config)
    _check_options(family, options)
    tokenizer = model_tokenizer(checkpoint, family, options.pre_tokenizer)
    notes = (*checkpoint.notes, *tokenizer.notes, *family.notes)
    calibration = None
    if options.calibrate:
        tokens = options.tokens_on(processes.device.type)
        calibration = Calibration(parts, draw_windows(checkpoint, tokenizer, parts, options, tokens))
        notes += calibration.windows.notes
    measured = None
    if is_mixed(options.bits):
        measured = _measure_sensitivity(checkpoint, family, options, calibration, processes)
    types = plan_types(
        family, options.bits, options.embedding_type, options.head_type, measured, options.per_layer_type
    )
    scope = choose_scope(family, options, processes.device)
    norm_biases: list[str] = []
    if calibration is not None:
        norm_biases = refined_norms(family) if options.refine else corrected_norms(family, options)
    file_type = FILE_TYPES[types.nearest_bits if is_mixed(options.bits) else int(options.bits)]
    metadata = d2q_metadata(types, options, rotated, calibration, scope)
    scaled = calibration is not None and options.dsq
    file = Output(checkpoint, family, tokenizer, types, norm_biases, metadata, file_type, scaled)
    size = file.size()
    if processes.is_main:
        _print_notes(notes, types, family, options)
    memory = None
    if calibration is not None:
        tokens = calibration.windows.calibration.size + calibration.windows.validation.size
        device, limit, count = processes.device, options.memory_limit, processes.world_size
        how = {"guidance": options.guidance, "refine": options.refine}
        memory = plan_memory(family, tokens, BATCH_TOKENS, device, output, types.linear_bytes, limit, count, **how)
    made = source, checkpoint, family, tokenizer, types, file, size, calibration, memory
    return Job(options, output, *made, processes, scope)


def draw_windows(
    checkpoint: Checkpoint, tokenizer: Tokenizer, parts: tuple[Part, ...], options: Options, tokens: int
) -> Windows:
    """Draw calibration windows of so many tokens, and validation windows, from texts."""
    original, template = source_tokenizer(checkpoint), ChatTemplate.of(tokenizer)
    return split_windows(original, parts, template, tokens, options.context, options.seed, tokenizer.bos)


def _check_options(family: Family, options: Options) -> None:
    """Refuse options that don't suit the model or each other."""
    check_request(family, options.bits, options.embedding_type, options.head_type, options.per_layer_type)
    if options.calibrate and options.context > family.context_length:
        raise D2QError(
            f"--context {options.context} is more than the {family.context_length} tokens that the model was made "
            "for; use at most that"
        )
    if options.refine and not options.calibrate:
        raise D2QError("--refine tunes the model on calibration text; leave out --no-calibration")


def _measure_sensitivity(
    checkpoint: Checkpoint,
    family: Family,
    options: Options,
    calibration: Calibration | None,
    processes: ProcessGroup,
) -> dict[str, float]:
    """Measure the sensitivity of every layer whose type is to be chosen, in the main process, for all."""
    if calibration is None:
        raise D2QError(
            f"--bits {options.bits:g} measures on calibration text which layers need more bits; leave out "
            "--no-calibration, or use --bits 2 or 3"
        )
    processes.connect()
    types = rounding_types(family)
    measured = dict.fromkeys(types, 0.0)
    if processes.is_main:
        runner = BlockRunner(checkpoint, family, processes.device)
        measured = sensitivity.measure(runner, types, sensitivity.choose_windows(calibration.windows.calibration))
    shared = torch.tensor(list(measured.values()), dtype=torch.float32)
    processes.all_reduce([shared])
    return dict(zip(measured, shared.tolist(), strict=True))


def _print_notes(notes: tuple[str, ...], types: TypePlan, family: Family, options: Options) -> None:
    """Print what one wouldn't expect: these notes, and tensors that won't have the requested type."""
    for note in notes:
        print(note, file=sys.stderr)
    if types.fallbacks:
        kinds = ", ".join(sorted({types.linears[name] for name in types.fallbacks}))
        print(
            f"{len(types.fallbacks)} of {len(types.linears)} linear layers become {kinds}: 64 doesn't divide their "
            "width",
            file=sys.stderr,
        )
    for wanted, name in (
        (options.embedding_type, family.embedding),
        (options.head_type, family.head),
        (options.per_layer_type, family.per_layer_table),
    ):
        if wanted and types.tables[f"{name}.weight"] != wanted.lower():
            became = types.tables[f"{name}.weight"]
            print(f"{name} becomes {became}: its width isn't a multiple of {wanted}'s block size", file=sys.stderr)
