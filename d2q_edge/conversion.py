"""Convert a Hugging Face checkpoint to a GGUF file: `plan` what to do, `execute` it, or `convert` for both."""

import shlex
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from d2q_edge.distributed.process_group import ProcessGroup
from d2q_edge.errors import D2QError
from d2q_edge.export.conversion_report import FORMAT
from d2q_edge.export.model_file import check_tokenizer
from d2q_edge.formats.gguf_writer import check_output
from d2q_edge.model.blocks import BlockRunner
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.options import Options
from d2q_edge.pipeline.block_loop import quantize_blocks
from d2q_edge.pipeline.device import choose_device
from d2q_edge.pipeline.memory import MemoryPlan
from d2q_edge.pipeline.output import QuantizedContent, RoundedContent
from d2q_edge.pipeline.planning import Job, draw_windows, plan
from d2q_edge.pipeline.recipe import Calibration, fingerprint
from d2q_edge.pipeline.refinement import Refinement, refine, refinement_tokens
from d2q_edge.pipeline.report import Report
from d2q_edge.pipeline.time_plan import TimePlan, plan_time
from d2q_edge.pipeline.type_plan import TypePlan
from d2q_edge.pipeline.work_dir import WorkDir, was_published
from d2q_edge.utils.locks import sole_writer
from d2q_edge.utils.progress import track

__all__ = ["Conversion", "Job", "convert", "execute", "plan"]


@dataclass(frozen=True)
class Conversion:
    """A finished, or only planned, conversion.

    Attributes:
        types: of the file's tensors.
        size: of the file, in bytes.
        bits_per_weight: mean over all tensors of the file.
        chats: whether the file has a chat template.
        report: what was measured; None when only planned.
        memory: what was taken at most; None when nothing was calibrated.
        refinement: what it did; None without it, or when an earlier run had tuned the whole model.
        time: what it is estimated to take; None unless only planned.
    """

    types: TypePlan
    size: int
    bits_per_weight: float
    chats: bool
    report: Report | None = None
    memory: MemoryPlan | None = None
    refinement: Refinement | None = None
    time: TimePlan | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values for json.dump: sizes, the type of every matrix, and what was measured (Report)."""
        return {
            "format": FORMAT,
            "bytes": self.size,
            "bits_per_weight": self.bits_per_weight,
            "linear_bits_per_weight": self.types.linear_bits_per_weight,
            "types": dict(self.types.all),
            **(self.report or Report()).to_json(),
            "refinement": asdict(self.refinement) if self.refinement else None,
        }

    def describe(self, output: Path) -> str:
        """Format a short text for people."""
        counts = Counter(self.types.all.values())
        lines = [
            f"{output}: {self.size:,} bytes, {self.bits_per_weight:.3f} bits per weight "
            f"({self.types.linear_bits_per_weight:.4f} in the blocks' matrices)",
            "types: " + ", ".join(f"{count} x {kind}" for kind, count in counts.most_common()),
        ]
        layers = self.types.layer_types()
        if any(len(kinds) > 1 for kinds in layers.values()):
            lines += [
                f"  {layer}: " + ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))
                for layer, kinds in layers.items()
            ]
        if self.time is not None and self.memory is not None:
            lines += [self.memory.describe(), self.time.describe()]
        if self.report and self.report.seconds:
            lines.append("time: " + ", ".join(f"{phase} {spent:.1f} s" for phase, spent in self.report.seconds.items()))
        if found := self.report.validation if self.report else None:
            lines.append(
                f"KL divergence on {found.tokens:,} tokens of validation text: {found.kl_divergence:.4f} "
                f"± {found.kl_divergence_stderr:.4f} (estimate, with embeddings and head unrounded)"
            )
        if self.refinement:
            what = "KL divergence" if self.refinement.scope == "model" else "mean error of the blocks' outputs"
            lines.append(
                f"refinement: {what} on validation text {self.refinement.before:.4f}, then {self.refinement.after:.4f}"
            )
        if self.report:
            file = shlex.quote(str(output))
            chat = f"d2q-edge chat {file}, or " if self.chats else ""
            lines.append(f"run it: {chat}d2q-edge run {file} -p PROMPT")
        return "\n".join(lines)


def convert(
    model: str | Path,
    output: str | Path,
    options: Options | None = None,
    *,
    dry_run: bool = False,
    force: bool = False,
    verify: bool = True,
) -> Conversion:
    """Quantize a checkpoint into a GGUF file of our tensor types.

    Interrupted work stays in OUTPUT.work, and the same call continues it.

    Args:
        model: a Hugging Face model directory, or an id of the hub.
        output: the file to write.
        options: what to do; None for the defaults.
        dry_run: stop after planning; nothing is written.
        force: replace an existing file, and unfinished work of another conversion.
        verify: refuse a tokenizer that does something else in llama.cpp than in transformers.

    Returns:
        Types and bytes of the file, and what was measured on the way.

    Raises:
        D2QError: anything wrong with the checkpoint, the options, the text, the device or the output.
    """
    output, options = Path(output), options or Options()
    processes = ProcessGroup.from_environment(choose_device(options.device))
    if dry_run:
        job = plan(model, output, options, processes)
        return replace(_result(job, None, job.memory), time=_planned_time(job))
    with sole_writer(output) if processes.is_main else nullcontext():
        if processes.is_main and not was_published(output):
            # Before anything that takes time; with the size, when that is known.
            check_output(output, force=force)
        return execute(plan(model, output, options, processes), force=force, verify=verify)


def execute(job: Job, *, force: bool = False, verify: bool = True) -> Conversion:
    """Do what was planned, or continue it where an earlier run was interrupted.

    Args:
        job: from `plan`.
        force, verify: as for `convert`.

    Raises:
        D2QError: a weight or activation is NaN or infinite, the output can't be written, or the tokenizer differs.
    """
    if job.processes.is_main and not was_published(job.output):
        check_output(job.output, force=force, size=job.size)
    if job.calibration is None:
        if job.processes.is_main:
            content = RoundedContent(job.checkpoint, job.family, job.types, job.processes.device)
            job.file.write(job.output, content, force, verify=verify)
        return _result(job, Report())
    return _quantize(job, job.calibration, force=force, verify=verify)


def _quantize(job: Job, calibration: Calibration, *, force: bool, verify: bool) -> Conversion:
    """Quantize block by block, refine where that is asked for, and write the file."""
    options, processes = job.options, job.processes
    processes.connect()
    if verify and processes.is_main:
        check_tokenizer(job.checkpoint, job.family, job.tokenizer)
    _check_weights(job.source, processes)
    if processes.is_main:
        _print_start(job, calibration)
    key = fingerprint(job.checkpoint, job.types, job.file.metadata, calibration.windows.calibration, processes)
    work = processes.main_first(lambda: WorkDir(job.output, key, force=force and processes.is_main))
    if was_published(job.output):
        # An earlier run was killed after publishing, before the work directory was removed.
        processes.barrier()
        if processes.is_main:
            work.remove()
        return _result(job, Report(), job.memory)
    if work.finished and processes.is_main:
        print(f"resuming after {work.finished} finished blocks from {work.path}", file=sys.stderr)
    runner = BlockRunner(job.checkpoint, job.family, processes.device)
    report = quantize_blocks(
        runner,
        job.types.linears,
        calibration.windows.calibration,
        work,
        options,
        validation=calibration.windows.validation,
        memory=job.memory,
        processes=processes,
        refine_blocks=job.scope is not None,
    )
    refinement = _tuned_blocks(job, work)
    if job.scope == "model":
        refinement = _refine(job, calibration, runner, work, report)
    if processes.is_main:
        with report.timed("writing"):
            _write(job, work, force=force, verify=verify)
        work.remove()
    processes.barrier()
    return _result(job, report, job.memory, refinement)


def _tuned_blocks(job: Job, work: WorkDir) -> Refinement | None:
    """Return what tuning the blocks did, unless the whole model is tuned after that."""
    if job.scope != "blocks":
        return None
    errors = [work.read_block(index).metrics.output_errors for index in range(job.family.num_layers)]
    before, after = (sum(each) / len(errors) for each in zip(*errors, strict=True))
    return Refinement("blocks", before, after)


def _refine(
    job: Job, calibration: Calibration, runner: BlockRunner, work: WorkDir, report: Report
) -> Refinement | None:
    """Tune the whole model, if no earlier run did."""
    finished = work.has_block(job.family.num_layers, refined=True)
    job.processes.barrier()
    if finished:
        return None
    options = job.options
    tokens = refinement_tokens(options)
    windows = draw_windows(job.checkpoint, job.tokenizer, calibration.parts, options, tokens).calibration
    with report.timed("model refinement"):
        return refine(runner, windows, work, seed=options.seed, processes=job.processes)


def _write(job: Job, work: WorkDir, *, force: bool, verify: bool) -> None:
    """Write the file in the work directory, and move it to its place."""
    content = QuantizedContent(job.checkpoint, job.family, work, job.processes.device, refined=job.scope == "model")
    job.file.write(work.complete, content, force=True, verify=verify)
    if job.output.exists() and not force:
        raise D2QError(
            f"{job.output} wasn't there when the conversion began, but is now; move it away, and repeat the command to "
            "finish"
        )
    work.publish()


def _result(
    job: Job, report: Report | None, memory: MemoryPlan | None = None, refinement: Refinement | None = None
) -> Conversion:
    chats = job.tokenizer.chat_template is not None
    return Conversion(job.types, job.size, job.file.bits_per_weight, chats, report, memory, refinement)


def _planned_time(job: Job) -> TimePlan | None:
    """Estimate how long a calibrated conversion will take on one device."""
    if job.calibration is None:
        return None
    tokens, context = job.calibration.windows.calibration.size, job.options.context
    return plan_time(job.family, job.types, tokens, context, job.options, job.processes.device)


def _print_start(job: Job, calibration: Calibration) -> None:
    """Print what the conversion will take."""
    if job.memory is not None:
        print(job.memory.describe(), file=sys.stderr)
    print(calibration.describe(), file=sys.stderr)
    if job.scope is not None:
        then = ", then the whole model by KL divergence" if job.scope == "model" else ""
        print(f"refining every block as soon as it is quantized{then}", file=sys.stderr)


def _check_weights(checkpoint: Checkpoint, processes: ProcessGroup) -> None:
    """Read every tensor once, each process its share, to find a damaged one now rather than in an hour.

    Raises:
        D2QError: a tensor can't be read, or is NaN or infinite.
    """
    names = list(checkpoint.names)[processes.rank :: processes.world_size]
    for name in track(names, "Checking", "tensor", quiet=not processes.is_main):
        checkpoint.tensor(name)
