"""Compare the speed of whole models in our types and in stock ones, with llama-bench.

The model is a given checkpoint, or a generated Qwen3 (like the bundled tokenizer) with random weights. Stock files are
made by llama-quantize, every matrix of the blocks in the same type; embeddings and head are Q8_0 in all files. Speed
doesn't depend on the weights, so our files have a few encoded rows of each layer, repeated: encoding all of them would
take minutes.

Types run in turn, for several rounds, so that a busy moment slows all of them alike. Types that llama.cpp can repack
are measured in both forms: of a stock type the better one counts, of ours the repacked one, which is the default.
Prints tokens per second and ratios of times (below 1 ours is faster); --json prints a map from phase and threads
("prompt-1") to `type/stock_type` to the median ratio of the rounds, --markdown the README's table of tokens per
second. --write writes what was measured to a file, as JSON; `make bench` does both. Needs `d2q-edge runtime install
--tools`.
"""

import contextlib
import json
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from d2q_edge.calibration.text import PROSE
from d2q_edge.errors import D2QError
from d2q_edge.evaluation.benchmark import PROMPT, median_speeds, run_rounds
from d2q_edge.export.model_file import Value, export, model_tokenizer, stored_floats
from d2q_edge.formats import codebooks, tensor_types
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from d2q_edge.options import BenchmarkOptions
from d2q_edge.pipeline.output import Content, Output
from d2q_edge.pipeline.planning import FILE_TYPES
from d2q_edge.pipeline.type_plan import plan_types
from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.rtn import round_layer
from d2q_edge.runtime.tools import INSTALLED, Tools

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-qwen3"
OURS = {"d2q2": 2, "d2q3": 3}
STOCK = ("q2_K", "iq2_xs", "q3_K", "q4_K", "q4_0")
REPACKED = (*OURS, "q2_K", "q4_K", "q4_0")
"""Types that llama.cpp can repack."""
ENCODED_ROWS = 16

Variant = tuple[str, bool]
"""A type, and whether llama.cpp may repack it."""
Times = dict[str, list[dict[Variant, float]]]
"""Seconds by phase and threads ("prompt-1"), round, and variant."""


@dataclass(frozen=True)
class Shape:
    """Shape of the generated model; heads of 128, two query heads for each key head."""

    layers: int = 8
    width: int = 2048
    feed_forward: int = 5632

    def config(self) -> dict[str, object]:
        """Return its config.json; the vocabulary is the example's."""
        return {
            **json.loads((EXAMPLE / "config.json").read_text("utf-8")),
            "hidden_size": self.width,
            "intermediate_size": self.feed_forward,
            "num_hidden_layers": self.layers,
            "max_window_layers": self.layers,
            "head_dim": 128,
            "num_attention_heads": self.width // 128,
            "num_key_value_heads": self.width // 256,
        }


class _RepeatedRows(Content):
    """The checkpoint's tensors; a quantized layer repeats its first rows."""

    def __init__(self, checkpoint: Checkpoint, types: dict[str, str]) -> None:
        self.checkpoint, self.types = checkpoint, types
        self.searches = {name: CodebookSearch(own) for name, own in tensor_types.BY_NAME.items()}

    def packed(self, name: str) -> npt.NDArray[np.uint8]:
        weights = self.checkpoint.tensor(name)
        kind = self.types[name]
        with torch.inference_mode():
            layer = round_layer(weights[:ENCODED_ROWS].float(), self.searches[kind])
        rows: npt.NDArray[np.uint8] = layer.pack(tensor_types.BY_NAME[kind])
        return np.resize(rows, (len(weights), rows.shape[1]))

    def floats(self, name: str) -> torch.Tensor:
        return stored_floats(self.checkpoint, name)


def generate_checkpoint(directory: Path, shape: Shape) -> None:
    """Write a checkpoint of random weights, with norm weights of one and the example's tokenizer.

    Raises:
        D2QError: a width is no multiple of 256.
    """
    if shape.width % 256 or shape.feed_forward % 256:
        raise D2QError("the generated model's widths must be multiples of 256, as the stock types' blocks are")
    directory.mkdir(parents=True)
    config = shape.config()
    (directory / "config.json").write_text(json.dumps(config), "utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / name, directory)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.ones(size, dtype=torch.bfloat16)
        if len(size) == 1
        else torch.empty(size, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        for name, size in family_for(config).tensor_shapes().items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def make_files(model: Path, out: Path) -> dict[str, Path]:
    """Write the model in every type; return the files by type."""
    f16, imatrix = out / "f16.gguf", out / "imatrix.gguf"
    export(model, f16, "f16", force=True)
    INSTALLED.run("llama-imatrix", "-m", f16, "-f", PROSE, "-o", imatrix, "-c", 128, "--chunks", 1)
    files = {}
    for name in STOCK:
        files[name] = out / f"{name}.gguf"
        tables = ("--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0")
        INSTALLED.run("llama-quantize", "--pure", "--imatrix", imatrix, *tables, f16, files[name], name.upper())
    checkpoint = Checkpoint.open(model)
    family = family_for(checkpoint.config)
    for name, bits in OURS.items():
        files[name] = out / f"{name}.gguf"
        plan = plan_types(family, bits, "q8_0", None if family.tied_embeddings else "q8_0")
        metadata: dict[str, Value] = {"d2q.table_sha256": codebooks.TABLE_SHA256}
        content = _RepeatedRows(checkpoint, dict(plan.linears))
        Output(checkpoint, family, model_tokenizer(checkpoint, family), plan, [], metadata, FILE_TYPES[bits]).write(
            files[name], content, force=True
        )
    return files


def measure(files: dict[str, Path], options: BenchmarkOptions, tools: Tools = INSTALLED) -> Times:
    """Run llama-bench on every variant in turn."""
    runs: dict[Variant, Sequence[object]] = {
        (name, repack): ("-m", path, "--repack", int(repack))
        for name, path in files.items()
        for repack in ((True, False) if name in REPACKED else (True,))
    }
    return run_rounds(runs, options, tools)


def ratios(rounds: list[dict[Variant, float]]) -> dict[str, float]:
    """Return the median over the rounds of our time over a stock type's, for every pair of types.

    Of a type with two forms, the one with the larger ratio counts.
    """
    result = {}
    for ours, stock in product(OURS, STOCK):
        result[f"{ours}/{stock}"] = max(
            statistics.median(times[ours, True] / times[variant] for times in rounds)
            for variant in rounds[0]
            if variant[0] == stock
        )
    return result


def speeds(times: Times, options: BenchmarkOptions) -> dict[Variant, dict[str, float]]:
    """Return tokens per second of every variant by phase, from the median of the rounds."""
    return {variant: median_speeds(options, times, variant) for variant in next(iter(times.values()))[0]}


def markdown(times: Times, options: BenchmarkOptions) -> str:
    """Format the README's table: tokens per second, of a stock type each column in its faster form."""
    phases = sorted(times, key=lambda phase: (phase.startswith(PROMPT), phase))
    heads = [f"{phase}, {count} thread{'s' * (count != '1')}" for phase, count in (p.split("-") for p in phases)]
    lines = [f"| tokens/s | {' | '.join(heads)} |", "|---" * (1 + len(phases)) + "|"]
    all_forms = speeds(times, options)
    for name in dict.fromkeys(name for name, _ in all_forms):
        forms = [seen for (kind, repack), seen in all_forms.items() if kind == name and (repack or name not in OURS)]
        best = (max(seen[phase] for seen in forms) for phase in phases)
        lines.append(f"| {name if name in OURS else name.upper()} | {' | '.join(f'{speed:.1f}' for speed in best)} |")
    return "\n".join(lines)


def measured(times: Times, options: BenchmarkOptions) -> dict[str, object]:
    """Return plain values for json.dump: tokens per second of every variant, and the ratios."""
    seen = {
        f"{name}, {'repacked' if repack else 'as it is'}": each
        for (name, repack), each in speeds(times, options).items()
    }
    return {
        **asdict(options),
        "tokens_per_second": seen,
        "ratios_of_times": {phase: ratios(rounds) for phase, rounds in sorted(times.items())},
    }


def table(times: Times, options: BenchmarkOptions) -> str:
    """Format tokens per second, then ratios of times, with a column for each phase and number of threads."""
    phases = sorted(times)
    lines = [f"{'tokens/s':18}" + "".join(f"{phase:>14}" for phase in phases)]
    for (name, repack), measured in speeds(times, options).items():
        label = f"{name}, as it is" if not repack else f"{name}, repacked" if name in REPACKED else name
        lines.append(f"{label:18}" + "".join(f"{measured[phase]:14.1f}" for phase in phases))
    lines += ["", f"{'ratio of times':18}" + "".join(f"{phase:>14}" for phase in phases)]
    columns = [ratios(times[phase]) for phase in phases]
    lines += [f"{pair:18}" + "".join(f"{column[pair]:14.3f}" for column in columns) for pair in columns[0]]
    return "\n".join(lines)


@contextlib.contextmanager
def prepared(model: Path | None, shape: Shape, keep: Path | None) -> Iterator[dict[str, Path]]:
    """Yield the files to measure, in `keep` if given; a complete set of an earlier run is reused."""
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) if keep is None else keep
        out.mkdir(parents=True, exist_ok=True)
        complete = out / "complete"
        described = f"{model.resolve() if model else shape}\n"
        if complete.is_file() and complete.read_text("utf-8") == described:
            yield {name: out / f"{name}.gguf" for name in (*STOCK, *OURS)}
            return
        complete.unlink(missing_ok=True)
        if model is None:
            model = Path(work) / "generated"
            generate_checkpoint(model, shape)
        files = make_files(model, out)
        complete.write_text(described, "utf-8")
        yield files


@click.command()
@click.option("--model", type=click.Path(path_type=Path), help="A Hugging Face model directory, not random weights.")
@click.option("--layers", default=Shape.layers, show_default=True, help="Number of blocks of the generated model.")
@click.option("--width", default=Shape.width, show_default=True)
@click.option("--feed-forward", default=Shape.feed_forward, show_default=True)
@click.option("--prompt", default=BenchmarkOptions.prompt, show_default=True, help="Tokens of the prompt.")
@click.option("--generation", default=BenchmarkOptions.generation, show_default=True, help="Tokens to generate.")
@click.option("--threads", type=int, multiple=True, default=BenchmarkOptions.threads, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=BenchmarkOptions.rounds, show_default=True)
@click.option("--keep", type=click.Path(path_type=Path), help="Keep the files in this directory for later runs.")
@click.option("--json", "as_json", is_flag=True, help="Only the ratios, as JSON.")
@click.option("--write", type=click.Path(path_type=Path), help="Write what was measured to this file, as JSON.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Only the README's table of tokens per second.")
def main(
    model: Path | None,
    layers: int,
    width: int,
    feed_forward: int,
    prompt: int,
    generation: int,
    threads: tuple[int, ...],
    rounds: int,
    keep: Path | None,
    write: Path | None,
    as_json: bool,
    as_markdown: bool,
) -> None:
    """Time models of our types against stock ones on this machine."""
    options = BenchmarkOptions(prompt, generation, threads, rounds)
    try:
        with prepared(model, Shape(layers, width, feed_forward), keep) as files:
            times = measure(files, options)
    except D2QError as error:
        raise click.ClickException(str(error)) from error
    if write:
        write.write_text(json.dumps(measured(times, options), indent=2) + "\n", "utf-8")
    if as_json:
        click.echo(json.dumps({phase: ratios(rounds) for phase, rounds in sorted(times.items())}, indent=2))
    else:
        click.echo(markdown(times, options) if as_markdown else table(times, options))


if __name__ == "__main__":
    main()
