"""Compare our types with stock ones on one model.

Converts a checkpoint to F16, D2Q2 and D2Q3, makes stock files with llama-quantize (and an importance matrix of the same
calibration text), and prints each file's size, bits per weight, perplexity, KL divergence from F16 and generation
speed, then a text continued by the D2Q2 file. Needs the runtime and its tools: `d2q-edge runtime install --tools`.
"""

from dataclasses import dataclass
from pathlib import Path

import click

from d2q_edge.conversion import convert
from d2q_edge.errors import D2QError
from d2q_edge.evaluation.benchmark import GENERATION, benchmark
from d2q_edge.evaluation.perplexity import Evaluation, evaluate
from d2q_edge.evaluation.stock import StockQuantizer
from d2q_edge.export.model_file import export
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from d2q_edge.options import BenchmarkOptions, Options
from d2q_edge.runtime.generate import generate
from d2q_edge.utils.machine import usable_cpus

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-qwen3"
STOCK = ("Q8_0", "Q4_K", "Q3_K", "Q2_K")
SPEED_ROUNDS = 7
PROMPT = "The old man looked out over the sea"


@dataclass(frozen=True)
class Row:
    """A row of the table; speed in generated tokens per second."""

    name: str
    evaluation: Evaluation
    speed: float


def make_stock_files(f16: Path, out: Path) -> dict[str, Path]:
    """Make a file of each stock type, with embeddings and head in Q8_0."""
    files = {name: out / f"{name}.gguf" for name in STOCK}
    for name, file in files.items():
        StockQuantizer(f16, pure=True).quantize(name, file)
    return files


def speeds(files: dict[str, Path]) -> dict[str, float]:
    """Measure generated tokens per second."""
    threads = usable_cpus()
    options = BenchmarkOptions(prompt=0, generation=256, threads=(threads,), rounds=SPEED_ROUNDS)
    return {name: speed[f"{GENERATION}-{threads}"] for name, speed in benchmark(files, options).speeds.items()}


def table(rows: list[Row]) -> str:
    """Format the rows."""
    lines = [f"{'file':8} {'bytes':>12} {'bits/weight':>11} {'perplexity':>10} {'KL divergence':>13} {'tokens/s':>9}"]
    for row in rows:
        e = row.evaluation
        divergence = e.kl_divergence_mean
        lines.append(
            f"{row.name:8} {e.bytes:12,} {e.bits_per_weight:11.3f} {e.perplexity:10.3f} "
            f"{'-' if divergence is None else f'{divergence:.4f}':>13} {row.speed:9.1f}"
        )
    return "\n".join(lines)


@click.command()
@click.option("--model", type=click.Path(path_type=Path), default=EXAMPLE, help="A Hugging Face model directory.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo"), show_default=True)
@click.option("--chunks", default=100, show_default=True, help="Chunks of the bundled text to evaluate on.")
def main(model: Path, out: Path, chunks: int) -> None:
    """Convert a model to every type, measure the files, and print a table."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        files = {"F16": out / "F16.gguf"}
        export(model, files["F16"], "f16", force=True)
        files |= make_stock_files(files["F16"], out)
        # Embeddings and head as in the stock files, so that the linear layers are what is compared.
        head_type = None if family_for(Checkpoint.open(model).config).tied_embeddings else "q8_0"
        for bits in (3, 2):
            files[f"D2Q{bits}"] = out / f"D2Q{bits}.gguf"
            options = Options(bits=bits, embedding_type="q8_0", head_type=head_type)
            convert(model, files[f"D2Q{bits}"], options, force=True)
        speed = speeds(files)
        rows = []
        for name, path in files.items():
            reference = None if name == "F16" else files["F16"]
            rows.append(Row(name, evaluate(path, reference, chunks=chunks), speed[name]))
        click.echo(table(rows))
        click.echo("\nD2Q2 continues:\n" + PROMPT + "".join(generate(files["D2Q2"], PROMPT, 80, 0.7, seed=1)))
    except D2QError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
