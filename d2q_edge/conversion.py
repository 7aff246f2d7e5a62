"""Checkpoint to GGUF, from beginning to end: plan, calibrate, quantize, write.

Knows the order of the parts and what they hand to each other. `convert` is what the command line calls.
"""

import os
import shlex
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from d2q_edge.calibration.text import Text, load_text
from d2q_edge.calibration.windows import split_windows
from d2q_edge.distributed.process_group import ProcessGroup
from d2q_edge.errors import D2QError
from d2q_edge.export.model_file import check_tokenizer, model_tokenizer
from d2q_edge.export.targets import check_targets
from d2q_edge.formats.gguf_writer import check_output
from d2q_edge.model.blocks import BlockRunner
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import Family, family_for
from d2q_edge.model.rotated_checkpoint import RotatedCheckpoint, rotation_pays
from d2q_edge.model.tokenizer.original import load_original
from d2q_edge.options import Options, check
from d2q_edge.pipeline.block_loop import BATCH_TOKENS, Method, corrected_norms, quantize_blocks
from d2q_edge.pipeline.memory import MemoryPlan, plan_memory
from d2q_edge.pipeline.output import Output, QuantizedContent, RoundedContent
from d2q_edge.pipeline.recipe import fingerprint, own_keys
from d2q_edge.pipeline.refinement import Refinement, refine, refined_norms
from d2q_edge.pipeline.report import Report
from d2q_edge.pipeline.sensitivity import choose_windows, measure
from d2q_edge.pipeline.type_plan import Plan, check_request, is_mixed, make_plan, rounding_types
from d2q_edge.pipeline.work_dir import WorkDir, was_published
from d2q_edge.quantize import triton
from d2q_edge.utils.output_lock import sole_writer

REFINE_FACTOR = 8
"""Refinement uses that many times the calibration tokens, as far as the text goes."""
FILE_TYPES = {2: 80, 3: 81}
"""general.file_type by bits, of a mixture the nearest; the patched llama.cpp calls them D2Q2 and D2Q3."""


@dataclass(frozen=True)
class Conversion:
    """A finished, or only planned, conversion.

    Attributes:
        plan: the tensor types.
        size: of the file in bytes.
        bits_per_weight: mean over all tensors of the file.
        chats: whether the file has a chat template.
        report: what was measured; None when only planned.
        memory: what was taken at most; None when nothing was calibrated.
        refinement: what it did; None without it, or when its result was there already.
    """

    plan: Plan
    size: int
    bits_per_weight: float
    chats: bool
    report: Report | None = None
    memory: MemoryPlan | None = None
    refinement: Refinement | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values for json.dump: bytes, bits per weight, the type of every matrix, and what was measured.

        layer_errors, column_scales, norm_shifts, validation, seconds: see report.Report. refinement: see there.
        """
        return {
            "bytes": self.size,
            "bits_per_weight": self.bits_per_weight,
            "linear_bits_per_weight": self.plan.linear_bits_per_weight,
            "types": dict(self.plan.types),
            **(self.report or Report()).to_json(),
            "refinement": asdict(self.refinement) if self.refinement else None,
        }

    def describe(self, output: Path) -> str:
        """A short text for people."""
        counts = Counter(self.plan.types.values())
        lines = [
            f"{output}: {self.size:,} bytes, {self.bits_per_weight:.3f} bits per weight "
            f"({self.plan.linear_bits_per_weight:.4f} in the blocks' matrices)",
            "types: " + ", ".join(f"{count} x {kind}" for kind, count in counts.most_common()),
        ]
        layers = self.plan.layer_types()
        if any(len(kinds) > 1 for kinds in layers.values()):
            lines += [
                f"  {layer}: " + ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))
                for layer, kinds in layers.items()
            ]
        if self.report and self.report.seconds:
            lines.append("time: " + ", ".join(f"{phase} {spent:.1f} s" for phase, spent in self.report.seconds.items()))
        if found := self.report.validation if self.report else None:
            lines.append(
                f"KL divergence on {found.tokens:,} tokens of held-back calibration text: {found.kl_divergence:.4f} "
                f"± {found.kl_divergence_stderr:.4f} (estimate, with embeddings and head unrounded)"
            )
        if self.refinement:
            lines.append(
                f"refinement: KL divergence on held-back calibration text {self.refinement.before:.4f}, "
                f"then {self.refinement.after:.4f}" + ("" if self.refinement.codes else "; no memory to tune codes")
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
    """Quantize a checkpoint into a GGUF of our tensor types.

    Interrupted work stays in OUTPUT.work, and the same call goes on from there.

    Args:
        model: a Hugging Face model directory, or an id of the hub.
        output: the file to write.
        options: see there; None for the defaults.
        dry_run: stop after planning; nothing is written.
        force: replace an existing file, and unfinished work of another conversion.
        verify: refuse a tokenizer that does something else in llama.cpp than in transformers (verify.py).

    Returns:
        Types and bytes of the file, and what was measured on the way.

    Raises:
        D2QError: anything wrong with the checkpoint, the options, the text, the device or the output.
    """
    output, options = Path(output), options or Options()
    processes = ProcessGroup.from_environment(choose_device(options.device))
    if processes.device.type == "cuda":
        # Now, while there is one thread only; the second imports Triton.
        torch.cuda.init()
        triton.is_available(processes.device)
    if dry_run:
        return _Job(model, output, options, processes, dry_run=True).planned()
    with sole_writer(output) if processes.is_main else nullcontext():
        if processes.is_main and not was_published(output):
            # Before anything that takes time; its size is checked when it is known.
            check_output(output, force=force)
        job = _Job(model, output, options, processes)
        if processes.is_main and not was_published(output):
            check_output(output, force=force, size=job.size)
        if job.calibration is None:
            return job.round(force=force, verify=verify)
        return job.quantize(job.calibration, force=force, verify=verify)


@dataclass(frozen=True)
class _Calibration:
    """What a model is calibrated on.

    Attributes:
        text: the whole text.
        windows: token ids [windows, context].
        validation: other windows, to measure the result on.
        memory: what it takes.
    """

    text: Text
    windows: npt.NDArray[np.int64]
    validation: npt.NDArray[np.int64]
    memory: MemoryPlan


class _Job:
    """One conversion, planned; then done by `round` or `quantize`."""

    def __init__(
        self, model: str | Path, output: Path, options: Options, processes: ProcessGroup, *, dry_run: bool = False
    ) -> None:
        self.output, self.options, self.processes = output, options, processes
        check(options)
        self.source = Checkpoint.open(model)
        texts = [] if options.calibration == "builtin" else [Path(options.calibration)]
        check_targets({"the output": output}, self.source.directory, texts)
        family = family_for(self.source.config)
        self.source.check(family.tensor_shapes())
        rotated = options.rotation == "on" or (options.rotation == "auto" and rotation_pays(family))
        self.checkpoint = RotatedCheckpoint(self.source, options.seed) if rotated else self.source
        self.family = family = family_for(self.checkpoint.config)
        tables = options.embedding_type, options.head_type
        check_request(family, options.bits, *tables)
        if options.calibrate and options.context > family.context_length:
            raise D2QError(
                f"--context {options.context} is more than the {family.context_length} tokens that the model was made "
                "for; use at most that"
            )
        if options.refine and not options.calibrate:
            raise D2QError("--refine tunes the model on calibration text; leave out --no-calibration")
        if options.refine and family.num_experts:
            raise D2QError("--refine can't tune a mixture of experts; leave it out")
        self.tokenizer = model_tokenizer(self.checkpoint, family, options.pre_tokenizer)
        text = load_text(options.calibration, "calibration") if options.calibrate else None
        windows = validation = None
        if text is not None:
            windows, validation = self._windows(text, options.calibration_tokens)
        self.method = Method(dsq=options.dsq, dac=options.dac)
        sensitivity = self._sensitivity(windows) if is_mixed(options.bits) else None
        self.plan = make_plan(family, options.bits, *tables, sensitivity)
        file_type = FILE_TYPES[self.plan.nearest_bits if is_mixed(options.bits) else int(options.bits)]
        metadata = own_keys(self.plan, options, self.method, rotated, text, windows)
        norm_biases = refined_norms(family) if options.refine else corrected_norms(family, self.method)
        norm_biases = [] if windows is None else norm_biases
        self.file = Output(self.checkpoint, family, self.tokenizer, self.plan, norm_biases, metadata, file_type)
        # Also finds out, before the long work, whether the metadata can be exported.
        self.size = self.file.size()
        if processes.is_main:
            _say_notes((*self.checkpoint.notes, *self.tokenizer.notes, *family.notes), self.plan, family, options)
        self.calibration = None
        if text is not None and windows is not None and validation is not None:
            tokens, limit, disk = windows.size + validation.size, options.memory_limit, self.plan.linear_bytes
            memory = plan_memory(
                family, tokens, BATCH_TOKENS, processes.device, output, disk, limit, processes.world_size
            )
            self.calibration = _Calibration(text, windows, validation, memory)

    def planned(self) -> Conversion:
        """What would be done."""
        return self._result(None, self.calibration.memory if self.calibration else None)

    def round(self, *, force: bool, verify: bool) -> Conversion:
        """Write the file without calibration."""
        if self.processes.is_main:
            content = RoundedContent(self.checkpoint, self.plan, self.processes.device)
            self.file.write(self.output, content, force, verify=verify)
        return self._result(Report())

    def quantize(self, calibration: _Calibration, *, force: bool, verify: bool) -> Conversion:
        """Quantize block by block, or go on doing it, and write the file."""
        family, processes, options, memory = self.family, self.processes, self.options, calibration.memory
        processes.connect()
        if verify and processes.is_main:
            check_tokenizer(self.checkpoint, family, self.tokenizer)
        _check_weights(self.source, processes)
        if processes.is_main:
            print(memory.describe(), file=sys.stderr)
            if calibration.windows.size + options.context <= options.calibration_tokens:
                print(f"the calibration text has {calibration.windows.size} tokens only; all are used", file=sys.stderr)
        key = fingerprint(self.checkpoint, self.plan, self.file.metadata, calibration.windows, processes)
        work = processes.main_first(lambda: WorkDir(self.output, key, force=force and processes.is_main))
        if was_published(self.output):
            # Killed at the very end: there is nothing left to do but tidying up.
            processes.barrier()
            if processes.is_main:
                work.remove()
            return self._result(Report(), memory)
        if work.finished and processes.is_main:
            print(f"going on after {work.finished} finished blocks in {work.path}", file=sys.stderr)
        runner = BlockRunner(self.checkpoint, family, processes.device)
        report = quantize_blocks(
            runner,
            self.plan.linears,
            calibration.windows,
            work,
            self.method,
            validation=calibration.validation,
            place=memory.place,
            processes=processes,
        )
        if not processes.is_main:
            processes.barrier()
            return self._result(report, memory)
        refinement = None
        if options.refine and not work.has_block(family.num_layers, refined=True):
            more, _ = self._windows(calibration.text, REFINE_FACTOR * options.calibration_tokens)
            refinement = refine(self.checkpoint, family, self.plan.linears, more, work, processes.device)
        with report.timed("writing"):
            content = QuantizedContent(self.checkpoint, family, work, processes.device, refined=options.refine)
            self.file.write(work.complete, content, force=True, verify=verify)
            if self.output.exists() and not force:
                raise D2QError(
                    f"{self.output} wasn't there when the conversion began, but is now; move it away, and repeat the "
                    "command to finish"
                )
            work.publish()
        work.remove()
        processes.barrier()
        return self._result(report, memory, refinement)

    def _result(
        self, report: Report | None, memory: MemoryPlan | None = None, refinement: Refinement | None = None
    ) -> Conversion:
        chats = self.tokenizer.chat_template is not None
        return Conversion(self.plan, self.size, self.file.bits_per_weight, chats, report, memory, refinement)

    def _windows(self, text: Text, tokens: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Calibration windows, and others."""
        options = self.options
        original = load_original(self.checkpoint.directory)
        return split_windows(original, text, tokens, options.context, options.seed, self.tokenizer.bos)

    def _sensitivity(self, windows: npt.NDArray[np.int64] | None) -> dict[str, float]:
        """Of every layer that a mixture has a choice for, as the first process measures it."""
        if windows is None:
            raise D2QError(
                f"--bits {self.options.bits:g} measures on calibration text which layers need more bits; leave out "
                "--no-calibration, or use --bits 2 or 3"
            )
        self.processes.connect()
        types = rounding_types(self.family)
        measured = dict.fromkeys(types, 0.0)
        if self.processes.is_main:
            runner = BlockRunner(self.checkpoint, self.family, self.processes.device)
            measured = measure(runner, types, choose_windows(windows))
        shared = torch.tensor(list(measured.values()), dtype=torch.float32)
        self.processes.all_reduce([shared])
        return dict(zip(measured, shared.tolist(), strict=True))


def _say_notes(notes: tuple[str, ...], plan: Plan, family: Family, options: Options) -> None:
    """Tell what one wouldn't expect: these notes, and tensors that won't have the type that was asked for."""
    for note in notes:
        print(note, file=sys.stderr)
    if plan.fallbacks:
        kinds = ", ".join(sorted({plan.linears[name] for name in plan.fallbacks}))
        print(
            f"{len(plan.fallbacks)} of {len(plan.linears)} linear layers become {kinds}: 64 doesn't divide their width",
            file=sys.stderr,
        )
    for wanted, name in ((options.embedding_type, family.embedding), (options.head_type, family.head)):
        if wanted and plan.tables[f"{name}.weight"] != wanted.lower():
            became = plan.tables[f"{name}.weight"]
            print(f"{name} becomes {became}: its width isn't a multiple of {wanted}'s block size", file=sys.stderr)


def choose_device(name: str) -> torch.device:
    """The torch device for "auto", "cpu", "cuda" or "mps"; auto is cuda where there is one.

    Raises:
        D2QError: this machine has no such device.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if available["cuda"] else "cpu"
    if name == "cuda":
        # Steps of many sizes, one after another, would leave half of what torch reserves in pieces that fit nothing.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if not available.get(name):
        raise D2QError(f"this machine's torch has no {name} device; use --device cpu")
    return torch.device(name)


def _check_weights(checkpoint: Checkpoint, processes: ProcessGroup) -> None:
    """Read everything once, each process its part: better find a damaged tensor of the last block now than in an hour.

    Raises:
        D2QError: a tensor can't be read, or is NaN or infinite.
    """
    names = list(checkpoint.names)[processes.rank :: processes.world_size]
    for name in tqdm(names, desc="Checking", unit="tensor", disable=None if processes.is_main else True):
        checkpoint.tensor(name)
