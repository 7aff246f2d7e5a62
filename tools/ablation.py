"""Compare the paper's recipe and ours, step by step, on the same models, texts and calibration, all in torch.

Every row quantizes the linear layers of the blocks (embeddings and head stay as they are), puts the dequantized weights
into the float32 model and measures perplexity and KL divergence from the original by llama-perplexity's protocol. Each
row is printed, and with --json written, as soon as it is measured. A new row is one line in ROWS. Needs no runtime.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from d2q_edge.calibration.chat_template import ChatTemplate
from d2q_edge.calibration.mixture import load_parts
from d2q_edge.calibration.text import load_evaluation
from d2q_edge.calibration.windows import split_windows
from d2q_edge.errors import D2QError
from d2q_edge.export.model_file import model_tokenizer
from d2q_edge.formats import tensor_types
from d2q_edge.model.blocks import BlockRunner
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import Family, family_for
from d2q_edge.model.rotated_checkpoint import RotatedCheckpoint
from d2q_edge.options import HIGHEST_BITS, LOWEST_BITS, Options
from d2q_edge.pipeline.block_loop import quantize_blocks
from d2q_edge.pipeline.device import choose_device
from d2q_edge.pipeline.refinement import REFINE_FACTOR, refine
from d2q_edge.pipeline.sensitivity import choose_windows, measure
from d2q_edge.pipeline.type_plan import TypePlan, is_mixed, plan_types, rounding_types
from d2q_edge.pipeline.work_dir import WorkDir
from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.rtn import round_layer
from d2q_edge.runtime.source_tokenizer import source_tokenizer
from tools.paper_recipe.pipeline import Recipe, quantize_model
from tools.torch_evaluation import Distance, Reference, evaluation_chunks
from tools.whole_model import Weights, WholeModel


@dataclass(frozen=True)
class Subject:
    """One model with its calibration tokens [windows, context], and more of them for refinement."""

    checkpoint: Checkpoint
    family: Family
    windows: npt.NDArray[np.int64]
    more_windows: npt.NDArray[np.int64]
    seed: int
    device: torch.device


@dataclass(frozen=True)
class Outcome:
    """A quantized model: a checkpoint, the weights that replace its own, and their mean stored size."""

    checkpoint: Checkpoint
    family: Family
    weights: Weights
    bits_per_weight: float


Row = Callable[[Subject, float], Outcome]
"""Quantizes a model to so many bits."""


@dataclass(frozen=True)
class Line:
    """One line of the table, with a distance per text."""

    model: str
    row: str
    bits: float | None
    bits_per_weight: float | None
    seconds: float
    texts: dict[str, Distance]


def paper(subject: Subject, bits: float, recipe: Recipe) -> Outcome:
    """Quantize by the paper's recipe, to 2 or 3 bits.

    Raises:
        D2QError: other bits are wanted.
    """
    if is_mixed(bits):
        raise D2QError(f"the paper's recipe has 2 or 3 bits, not {bits:g}; choose other rows with --only")
    bits = int(bits)
    runner = BlockRunner(subject.checkpoint, subject.family, subject.device)
    weights = quantize_model(runner, recipe, bits, subject.windows)
    return Outcome(subject.checkpoint, subject.family, weights, recipe.bits_per_weight(subject.family, bits))


def our_types(subject: Subject, bits: float) -> TypePlan:
    """Choose the types of the layers; a mixture by their sensitivity, as a conversion does."""
    measured = None
    if is_mixed(bits):
        runner = BlockRunner(subject.checkpoint, subject.family, subject.device)
        measured = measure(runner, rounding_types(subject.family), choose_windows(subject.windows))
    return plan_types(subject.family, bits, sensitivity=measured)


def ours_rounded(subject: Subject, bits: float) -> Outcome:
    """Round to our types without calibration."""
    plan = our_types(subject, bits)
    searches = {
        kind: CodebookSearch(tensor_types.BY_NAME[kind], subject.device)
        for kind in set(plan.linears.values()) & tensor_types.BY_NAME.keys()
    }
    weights = {}
    for name, kind in plan.linears.items():
        if kind in searches:
            weight = subject.checkpoint.tensor(name).to(subject.device, torch.float32)
            weights[name] = round_layer(weight, searches[kind]).weights
    return Outcome(subject.checkpoint, subject.family, weights, plan.linear_bits_per_weight)


def ours(subject: Subject, bits: float, options: Options, *, refined: bool = False) -> Outcome:
    """Quantize to our types by the product's pipeline, optionally with refinement on more of the same text."""
    checkpoint, family = subject.checkpoint, subject.family
    plan = our_types(subject, bits)
    weights: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as directory:
        work = WorkDir(Path(directory) / "model", {})
        runner = BlockRunner(checkpoint, family, subject.device)
        quantize_blocks(runner, plan.linears, subject.windows, work, options, refine_blocks=refined)
        if refined:
            refine(runner, subject.more_windows, work)
        for index in range(work.finished):
            block = work.read_block(index, refined=refined)
            prefix = family.block_prefix(index) if index < family.num_layers else ""
            for layer, weight in block.weights.items():
                weights[f"{prefix}{layer}.weight"] = weight.take_values(torch.device("cpu"))
            for name, values in block.floats.items():
                weights[prefix + name] = torch.from_numpy(values)
            for norm, bias in block.norm_biases.items():
                weights[f"{prefix}{norm}.bias"] = torch.from_numpy(bias)
            if family.head in block.column_scales:
                # The final norm's weight, which is in there too, was multiplied by them.
                head = f"{family.head}.weight"
                weights[head] = checkpoint.tensor(head).float() / torch.from_numpy(block.column_scales[family.head])
    return Outcome(checkpoint, family, weights, plan.linear_bits_per_weight)


def rotated(subject: Subject, bits: float, row: Row) -> Outcome:
    """Quantize the rotated model by another row."""
    checkpoint = RotatedCheckpoint(subject.checkpoint, subject.seed)
    return row(replace(subject, checkpoint=checkpoint, family=family_for(checkpoint.config)), bits)


PLAIN = Options(dsq=False, dac=False, guidance=False, descent_rounds=0)
ROWS: dict[str, Row] = {
    "RTN": partial(paper, recipe=Recipe(feedback=False)),
    "GPTQ": partial(paper, recipe=Recipe(alpha=0)),
    "GPTAQ": partial(paper, recipe=Recipe()),
    "+rotation": partial(rotated, row=partial(paper, recipe=Recipe())),
    "+DSQ": partial(rotated, row=partial(paper, recipe=Recipe(dual_scale=True))),
    "+DAC": partial(rotated, row=partial(paper, recipe=Recipe(dual_scale=True, correct=True))),
    "D2Q-RTN": ours_rounded,
    "D2Q-GPTQ": partial(ours, options=replace(PLAIN, alpha=0.0)),
    "D2Q-GPTAQ": partial(ours, options=PLAIN),
    "D2Q+descent": partial(ours, options=Options(dsq=False, dac=False, guidance=False)),
    "D2Q+DSQ": partial(ours, options=Options(dac=False, guidance=False)),
    "D2Q+DAC": partial(ours, options=Options(guidance=False)),
    "D2Q+guidance": partial(ours, options=Options()),
    "D2Q+refine": partial(ours, options=Options(), refined=True),
    "D2Q+rotation-DSQ": partial(rotated, row=partial(ours, options=Options(dsq=False))),
    "D2Q+rotation": partial(rotated, row=partial(ours, options=Options())),
}
"""The first six rows are the paper's. A row with a plus adds a step to the row above it."""


class Ablation:
    """One model, the rows' results on which are to be measured."""

    def __init__(self, model: Path, arguments: argparse.Namespace) -> None:
        """Read the checkpoint and the texts, and run the original model.

        Raises:
            D2QError: a file can't be read, a text is too short, or this machine lacks the device.
        """
        self.name = model.name
        device = choose_device(arguments.device)
        checkpoint = Checkpoint.open(model)
        family = family_for(checkpoint.config)
        checkpoint.check(family.tensor_shapes())
        tokenizer, own = source_tokenizer(checkpoint), model_tokenizer(checkpoint, family)
        parts, template = load_parts(arguments.calibration), ChatTemplate.of(own)
        few, more = (
            split_windows(tokenizer, parts, template, tokens, arguments.context, arguments.seed, own.bos).calibration
            for tokens in (arguments.tokens, REFINE_FACTOR * arguments.tokens)
        )
        self.subject = Subject(checkpoint, family, few, more, arguments.seed, device)
        original = WholeModel(checkpoint, family, {}, device)
        self.references = {}
        for name, where in arguments.text:
            text = load_evaluation(where)
            chunks = evaluation_chunks(tokenizer, text, template, arguments.chunks, arguments.context, own.bos)
            self.references[name] = Reference(original, chunks)
        self.original = Line(self.name, "original", None, None, 0.0, self._measure(original))

    def run(self, row: str, bits: float) -> Line:
        """Quantize by one row and measure the result."""
        self._wait()
        start = time.perf_counter()
        with torch.no_grad():
            outcome = ROWS[row](self.subject, bits)
        self._wait()
        seconds = time.perf_counter() - start
        model = WholeModel(outcome.checkpoint, outcome.family, outcome.weights, self.subject.device)
        return Line(self.name, row, bits, outcome.bits_per_weight, seconds, self._measure(model))

    def _measure(self, model: WholeModel) -> dict[str, Distance]:
        return {name: reference.compare(model) for name, reference in self.references.items()}

    def _wait(self) -> None:
        if self.subject.device.type == "cuda":
            torch.cuda.synchronize()


def heading(texts: list[str]) -> str:
    """Return the table's header."""
    columns = "".join(f" {name + ' PPL':>12} {name + ' KLD':>12}" for name in texts)
    return f"{'model':16} {'row':16} {'bits':>4} {'bpw':>7} {'seconds':>8}{columns}"


def format_line(line: Line) -> str:
    """Format one line of the table."""
    bits = "-" if line.bits is None else f"{line.bits:g}"
    size = "-" if line.bits_per_weight is None else f"{line.bits_per_weight:.4f}"
    measured = "".join(f" {found.perplexity:12.3f} {found.kl_divergence:12.4f}" for found in line.texts.values())
    return f"{line.model:16} {line.row:16} {bits:>4} {size:>7} {line.seconds:8.1f}{measured}"


def main(argv: list[str] | None = None) -> None:
    """Measure all rows and print the table."""
    arguments = _parse(argv)
    names = [name for name, _ in arguments.text]
    print(heading(names), flush=True)
    lines: list[Line] = []

    def report(line: Line) -> None:
        print(format_line(line), flush=True)
        lines.append(line)
        if arguments.json:
            content = [asdict(line) for line in lines]
            arguments.json.write_text(json.dumps(content, indent=1), encoding="utf-8")

    try:
        for model in arguments.models:
            ablation = Ablation(model, arguments)
            report(ablation.original)
            for bits in arguments.bits:
                for row in arguments.only or ROWS:
                    report(ablation.run(row, bits))
    except D2QError as error:
        sys.exit(f"Error: {error}")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="Hugging Face model directory")
    parser.add_argument("--calibration", default="builtin", help="text file (default: the bundled text)")
    parser.add_argument("--tokens", type=int, default=65536, help="calibration tokens (default: %(default)s)")
    parser.add_argument("--context", type=int, default=512, help="tokens per window and chunk (default: %(default)s)")
    parser.add_argument("--text", type=_named_text, action="append", metavar="NAME=FILE", help="text to measure on")
    parser.add_argument("--chunks", type=int, default=100, help="of each text at most (default: %(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bits", type=_bits, nargs="+", default=[2, 3], help="fractions mix our types over the layers")
    parser.add_argument("--only", nargs="+", choices=tuple(ROWS), metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    arguments = parser.parse_args(argv)
    arguments.text = arguments.text or [("builtin", "builtin")]
    return arguments


def _bits(value: str) -> float:
    bits = float(value)
    if is_mixed(bits) and not LOWEST_BITS <= bits <= HIGHEST_BITS:
        raise argparse.ArgumentTypeError(f"{value} isn't 2, 3, or between {LOWEST_BITS} and {HIGHEST_BITS}")
    return bits


def _named_text(value: str) -> tuple[str, str]:
    name, equals, where = value.partition("=")
    if not (name and equals and where):
        raise argparse.ArgumentTypeError(f"{value!r} isn't of the form NAME=FILE")
    return name, where


if __name__ == "__main__":
    main()
