"""Checkpoint to GGUF, from beginning to end: plan, calibrate, quantize, write.

Knows the order of the parts and what they hand to each other. `convert` is what the command line calls.
"""

import hashlib
import json
import os
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from d2q_edge import __version__, codebooks
from d2q_edge.blocks import BlockRunner
from d2q_edge.calibration import Text, load_text, split_windows
from d2q_edge.checkpoint import Checkpoint
from d2q_edge.errors import D2QError
from d2q_edge.export import Value, check_tokenizer
from d2q_edge.families import Family, family_for
from d2q_edge.gguf_file import check_output
from d2q_edge.memory import MemoryPlan, plan_memory
from d2q_edge.output import Output, QuantizedContent, RoundedContent
from d2q_edge.pipeline import BATCH_TOKENS, Method, corrected_norms, quantize_blocks
from d2q_edge.plan import Plan, check_request, is_mixed, make_plan, rounding_types
from d2q_edge.quantize.rotation import RotatedCheckpoint, rotation_pays
from d2q_edge.ranks import Ranks
from d2q_edge.refinement import Refinement, refine, refined_norms
from d2q_edge.report import Report
from d2q_edge.sensitivity import choose_windows, measure
from d2q_edge.tokenizer import read_tokenizer
from d2q_edge.tokenizer.original import load_original
from d2q_edge.work_dir import WorkDir, was_published

FORMAT_VERSION = 1
"""Value of d2q.version: the layout of the blocks and the meaning of the d2q.* keys."""
REFINE_FACTOR = 8
"""Refinement uses that many times the calibration tokens, as far as the text goes."""
FILE_TYPES = {2: 80, 3: 81}
"""general.file_type by bits, of a mixture the nearest; the patched llama.cpp calls them D2Q2 and D2Q3."""


@dataclass(frozen=True)
class Options:
    """What decides the content of the file.

    Attributes:
        bits: 2, 3, or the mean over the blocks' linear layers of a mixture of types.
        calibrate: quantize with error feedback on calibration text; otherwise round to nearest, in seconds.
        calibration: a text file, or "builtin".
        calibration_tokens: how many.
        context: tokens per calibration window.
        seed: of the choice of windows, and of the rotation.
        rotation: "on", "off", or "auto" for what pays (quantize/rotation.py).
        dsq: column scales (quantize/dsq.py).
        dac: norm biases (quantize/dac.py).
        refine: tune the whole model afterwards (quantize/refine.py).
        embedding_type, head_type: stock types; None chooses.
        device: "auto", "cpu", "cuda" or "mps".
        memory_limit: bytes of the computer's memory that may be taken; None for what is free.
        pre_tokenizer: llama.cpp's name for the way the tokenizer splits text; None finds it.
    """

    bits: float = 2
    calibrate: bool = True
    calibration: str = "builtin"
    calibration_tokens: int = 65536
    context: int = 512
    seed: int = 0
    rotation: str = "auto"
    dsq: bool = True
    dac: bool = True
    refine: bool = False
    embedding_type: str | None = None
    head_type: str | None = None
    device: str = "auto"
    memory_limit: int | None = None
    pre_tokenizer: str | None = None


@dataclass(frozen=True)
class Conversion:
    """A finished, or only planned, conversion.

    Attributes:
        plan: the tensor types.
        size: of the file in bytes.
        report: what was measured; None when only planned.
        memory: what was taken at most; None when nothing was calibrated.
        refinement: what it did; None without it, or when its result was there already.
    """

    plan: Plan
    size: int
    report: Report | None
    memory: MemoryPlan | None = None
    refinement: Refinement | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values for json.dump: bytes, bits per weight, the type of every matrix, and what was measured.

        layer_errors, column_scales, norm_shifts, held_back, seconds: see report.Report. refinement: see there.
        """
        return {
            "bytes": self.size,
            "bits_per_weight": self.plan.bits_per_weight,
            "linear_bits_per_weight": self.plan.linear_bits_per_weight,
            "types": dict(self.plan.types),
            **(self.report or Report()).to_json(),
            "refinement": asdict(self.refinement) if self.refinement else None,
        }

    def describe(self, output: Path) -> str:
        """A short text for people."""
        counts = Counter(self.plan.types.values())
        lines = [
            f"{output}: {self.size:,} bytes, {self.plan.bits_per_weight:.3f} bits per weight "
            f"({self.plan.linear_bits_per_weight:.4f} in the blocks)",
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
        if found := self.report.held_back if self.report else None:
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
            lines.append(f"run it: d2q-edge chat {output}, or d2q-edge run {output} -p PROMPT")
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
    ranks = Ranks.join(choose_device(options.device))
    if not dry_run and not was_published(output):
        # Before anything that takes time; its size is checked when it is known.
        ranks.in_turn(lambda: check_output(output, force=force))
    source = Checkpoint.open(model)
    family = family_for(source.config)
    source.check(family.tensor_shapes())
    rotated = options.rotation == "on" or (options.rotation == "auto" and rotation_pays(family))
    checkpoint = RotatedCheckpoint(source, options.seed) if rotated else source
    family = family_for(checkpoint.config)
    tables = options.embedding_type, options.head_type
    check_request(family, options.bits, *tables)
    if options.refine and not options.calibrate:
        raise D2QError("--refine tunes the model on calibration text; leave out --no-calibration")
    if options.refine and family.num_experts:
        raise D2QError("--refine can't tune a mixture of experts; leave it out")
    text = load_text(options.calibration, "calibration") if options.calibrate else None
    windows = held_back = None
    if text is not None:
        windows, held_back = _calibration_windows(checkpoint, family, text, options, options.calibration_tokens)
    sensitivity = None
    if is_mixed(options.bits):
        sensitivity = _sensitivity(checkpoint, family, options, windows, ranks)
    plan = make_plan(family, options.bits, *tables, sensitivity)
    file_type = FILE_TYPES[plan.nearest_bits if is_mixed(options.bits) else int(options.bits)]
    method = Method(dsq=options.dsq, dac=options.dac)
    metadata = _metadata(plan, options, method, rotated, text, windows)
    norm_biases = refined_norms(family) if options.refine else corrected_norms(family, method)
    norm_biases = [] if windows is None else norm_biases
    file = Output(checkpoint, family, plan, norm_biases, metadata, file_type, options.pre_tokenizer)
    # Also finds out, before the long work, whether tokenizer and metadata can be exported.
    size = file.size()
    if ranks.is_first:
        _say_notes(plan, family, options)
    memory = None
    if windows is not None and held_back is not None:
        tokens, limit, disk = windows.size + held_back.size, options.memory_limit, plan.linear_bytes
        memory = plan_memory(family, tokens, BATCH_TOKENS, ranks.device, output, disk, limit, ranks.count)
    if dry_run:
        return Conversion(plan, size, None, memory)
    if not was_published(output):
        ranks.in_turn(lambda: check_output(output, force=force, size=size))
    if windows is None or text is None or memory is None:
        if ranks.is_first:
            file.write(output, RoundedContent(checkpoint, plan, ranks.device), force, verify=verify)
        return Conversion(plan, size, Report())

    if verify and ranks.is_first:
        check_tokenizer(checkpoint, family, options.pre_tokenizer)
    _check_weights(source, ranks)
    if ranks.is_first:
        print(memory.describe(), file=sys.stderr)
        if windows.size + options.context <= options.calibration_tokens:
            print(f"the calibration text has {windows.size} tokens only; all are used", file=sys.stderr)
    fingerprint = _fingerprint(checkpoint, plan, file.metadata, windows, ranks)
    work = ranks.in_turn(lambda: WorkDir(output, fingerprint, force=force and ranks.is_first))
    if was_published(output):
        # Killed at the very end: there is nothing left to do but tidying up.
        ranks.wait()
        if ranks.is_first:
            work.remove()
        return Conversion(plan, size, Report(), memory)
    if work.finished and ranks.is_first:
        print(f"going on after {work.finished} finished blocks in {work.path}", file=sys.stderr)
    runner = BlockRunner(checkpoint, family, ranks.device)
    report = quantize_blocks(
        runner, plan.linears, windows, work, method, held_back=held_back, place=memory.place, ranks=ranks
    )
    if not ranks.is_first:
        ranks.wait()
        return Conversion(plan, size, report, memory)
    refinement = None
    if options.refine and not work.has_block(family.num_layers, refined=True):
        more, _ = _calibration_windows(checkpoint, family, text, options, REFINE_FACTOR * options.calibration_tokens)
        refinement = refine(checkpoint, family, plan.linears, more, work, ranks.device)
    with report.timed("writing"):
        content = QuantizedContent(checkpoint, family, work, ranks.device, refined=options.refine)
        file.write(work.complete, content, force=True, verify=verify)
        work.publish()
    work.remove()
    ranks.wait()
    return Conversion(plan, output.stat().st_size, report, memory, refinement)


def _say_notes(plan: Plan, family: Family, options: Options) -> None:
    """Tell what one wouldn't expect: of the family, and of tensors that won't have the type that was asked for."""
    for note in family.notes:
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


def load_tokenizer(checkpoint: Checkpoint, family: Family, pre_tokenizer: str | None = None) -> tuple[Any, int | None]:
    """A checkpoint's tokenizer, of transformers, and the token that llama.cpp puts first, if it does.

    Raises:
        D2QError: the tokenizer can't be loaded, or can't be exported.
    """
    exported = read_tokenizer(checkpoint.directory, checkpoint.config, family.vocab_size, pre_tokenizer)
    return load_original(checkpoint.directory), exported.bos


def _check_weights(checkpoint: Checkpoint, ranks: Ranks) -> None:
    """Read everything once, each process its part: better find a damaged tensor of the last block now than in an hour.

    Raises:
        D2QError: a tensor can't be read, or is NaN or infinite.
    """
    names = list(checkpoint.names)[ranks.rank :: ranks.count]
    for name in tqdm(names, desc="Checking", unit="tensor", disable=None if ranks.is_first else True):
        checkpoint.tensor(name)


def _calibration_windows(
    checkpoint: Checkpoint, family: Family, text: Text, options: Options, tokens: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    tokenizer, bos = load_tokenizer(checkpoint, family, options.pre_tokenizer)
    return split_windows(tokenizer, text, tokens, options.context, options.seed, bos)


def _metadata(
    plan: Plan,
    options: Options,
    method: Method,
    rotated: bool,
    text: Text | None,
    windows: npt.NDArray[np.int64] | None,
) -> dict[str, Value]:
    """The d2q.* keys: what a reader needs, and what it takes to make the file again."""
    recipe: dict[str, Any] = {"bits": options.bits, "method": "rtn", "rotation": rotated, "dsq": False, "dac": False}
    if rotated:
        recipe["seed"] = options.seed
    if text is not None and windows is not None:
        recipe |= {
            "method": "gptaq",
            "alpha": method.alpha,
            "dsq": method.dsq,
            "dac": method.dac,
            "rounds": method.rounds,
            "refine": options.refine,
            "calibration": text.source,
            "calibration_sha256": text.sha256,
            "calibration_tokens": windows.size,
            "context": options.context,
            "seed": options.seed,
        }
        if is_mixed(options.bits):
            recipe |= {"allocation": "divergence", "allocation_windows": len(choose_windows(windows))}
    return {
        "d2q.version": FORMAT_VERSION,
        "d2q.recipe": json.dumps(recipe),
        "d2q.table_sha256": codebooks.TABLE_SHA256,
        "d2q.bits_per_weight": plan.bits_per_weight,
    }


def _sensitivity(
    checkpoint: Checkpoint,
    family: Family,
    options: Options,
    windows: npt.NDArray[np.int64] | None,
    ranks: Ranks,
) -> dict[str, float]:
    """Of every layer that a mixture has a choice for, as the first process measures it."""
    if windows is None:
        raise D2QError(
            f"--bits {options.bits:g} measures on calibration text which layers need more bits; leave out "
            "--no-calibration, or use --bits 2 or 3"
        )
    types = rounding_types(family)
    measured = dict.fromkeys(types, 0.0)
    if ranks.is_first:
        measured = measure(BlockRunner(checkpoint, family, ranks.device), types, choose_windows(windows))
    shared = torch.tensor(list(measured.values()), dtype=torch.float32)
    ranks.sum([shared])
    return dict(zip(measured, shared.tolist(), strict=True))


def _fingerprint(
    checkpoint: Checkpoint,
    plan: Plan,
    metadata: dict[str, Value],
    windows: npt.NDArray[np.int64],
    ranks: Ranks,
) -> dict[str, Any]:
    """What decides the content of the packed blocks."""
    weights = sorted(checkpoint.directory.glob("*.safetensors"))
    return {
        "d2q-edge": __version__,
        "model": str(checkpoint.directory.resolve()),
        "config.json": checkpoint.config,
        "weight files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in weights],
        "recipe": metadata,
        "types": dict(plan.linears),
        "calibration tokens": hashlib.sha256(windows.tobytes()).hexdigest(),
        "device": ranks.device.type,
        "processes": ranks.count,
    }
