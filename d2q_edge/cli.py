"""The command line: parses options and calls the library, nothing else.

Results go to stdout, messages and progress to stderr. Exit codes: 0 done, 1 the request can't be carried out, 2 wrong
usage, 130 interrupted. Imports are inside the commands, because torch takes seconds to load and --help should not.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from d2q_edge import __version__
from d2q_edge.errors import D2QError

PATH = click.Path(path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="d2q-edge")
def cli() -> None:
    """2- and 3-bit GGUF files for llama.cpp on laptops and phones."""


@cli.command()
@click.argument("model", type=PATH)
@click.option("-o", "--output", type=PATH, help="The GGUF file to write.  [default: named after the model]")
@click.option("--bits", type=float, help="2, 3, or a mean of 2.31 to 4.3 bits per weight.  [default: 2]")
@click.option("--type", "stock_type", help="Write a stock type (f32, f16, bf16, q8_0, ...) instead of quantizing.")
@click.option("--calibration", default="builtin", show_default=True, help="Text file that stands for what users write.")
@click.option("--calibration-tokens", type=click.IntRange(1), default=65536, show_default=True)
@click.option(
    "--context", type=click.IntRange(8), default=512, show_default=True, help="Tokens per calibration window."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of all random choices.")
@click.option(
    "--rotation",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Spread outlier channels over their neighbours; unties tied embeddings.",
)
@click.option("--dsq/--no-dsq", default=True, show_default=True, help="Column scales, absorbed by neighbours.")
@click.option("--dac/--no-dac", default=True, show_default=True, help="Biases in norms for the mean shift.")
@click.option("--refine", is_flag=True, help="Tune scales and codes afterwards: better, and much slower.")
@click.option("--no-calibration", is_flag=True, help="Round to nearest: quick, and worse.")
@click.option("--embedding-type", help="Stock type of the embeddings.  [default: by --bits]")
@click.option("--head-type", help="Stock type of the head, where it isn't tied.  [default: by --bits]")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", show_default=True)
@click.option("--dry-run", is_flag=True, help="Print the plan and the exact size; write nothing.")
@click.option("--force", is_flag=True, help="Replace an existing file, or unfinished work with other options.")
@click.option("--report", type=PATH, help="Write what was measured to a JSON file.")
def convert(model: Path, output: Path | None, stock_type: str | None, **options: Any) -> None:
    """Quantize the Hugging Face checkpoint in the directory MODEL into a GGUF file."""
    _wait_passively()
    from d2q_edge import export
    from d2q_edge.checkpoint import Checkpoint
    from d2q_edge.convert import Options
    from d2q_edge.convert import convert as quantize
    from d2q_edge.families import family_for
    from d2q_edge.gguf_file import check_output

    bits, force, report = options["bits"], options["force"], options["report"]
    if stock_type is not None:
        for option in ("bits", "no_calibration", "embedding_type", "head_type", "refine", "dry_run", "report"):
            if options[option]:
                raise click.UsageError(f"--type writes a stock file; it doesn't go with --{option.replace('_', '-')}")
        if options["rotation"] == "on":
            raise click.UsageError("--type writes a stock file; it doesn't go with --rotation on")
    bits = 2 if bits is None else int(bits) if bits in (2, 3) else bits
    if output is None:
        checkpoint = Checkpoint.open(model)
        output = Path(export.file_name(checkpoint, family_for(checkpoint.config), stock_type or f"D2Q{bits:g}"))
    if stock_type is not None:
        size = export.export(model, output, stock_type.lower(), force=force)
        click.echo(f"{output}: {size:,} bytes")
        return
    chosen = Options(
        bits=bits,
        calibrate=not options["no_calibration"],
        **{
            name: options[name]
            for name in (
                "calibration",
                "calibration_tokens",
                "context",
                "seed",
                "rotation",
                "dsq",
                "dac",
                "refine",
                "embedding_type",
                "head_type",
                "device",
            )
        },
    )
    if report:
        # Better now than after the work.
        check_output(report, force=True)
    result = quantize(model, output, chosen, dry_run=options["dry_run"], force=force)
    if report:
        _write_json(report, result.to_json())
    click.echo(result.describe(output))


def _wait_passively() -> None:
    """Let OpenMP's threads sleep while they wait; call it before torch or llama.cpp is loaded.

    They spin otherwise, and when anything else uses the CPU, many small operations become 40 times slower (measured).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@cli.command("eval")
@click.argument("file", type=PATH)
@click.option("--reference", type=PATH, help="GGUF of the original model; adds KL divergence and top-1 agreement.")
@click.option("--text", default="builtin", show_default=True, help="Text file to measure on.")
@click.option("--chunks", type=click.IntRange(1), help="Measure at most that many chunks.  [default: all]")
@click.option("--context", type=click.IntRange(8), default=512, show_default=True, help="Tokens per chunk.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(file: Path, reference: Path | None, text: str, chunks: int | None, context: int, as_json: bool) -> None:
    """Perplexity of a GGUF FILE, and its distance from a reference, as llama-perplexity measures them."""
    _wait_passively()
    from d2q_edge.evaluate import evaluate as measure

    result = measure(file, reference, text, chunks, context).to_json()
    if as_json:
        click.echo(json.dumps(result))
        return
    for name, value in result.items():
        if value is not None:
            click.echo(f"{name:22} {value:,.6g}" if isinstance(value, float) else f"{name:22} {value:,}")


@cli.command()
@click.argument("file", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(file: Path, as_json: bool) -> None:
    """What a GGUF FILE holds: tensor types, sizes, recipe."""
    from d2q_edge import inspection

    facts = inspection.inspect(file)
    click.echo(json.dumps(facts) if as_json else inspection.describe(facts))


@cli.command()
@click.argument("file", type=PATH)
@click.option("-p", "--prompt", required=True, help="Text to continue.")
@click.option(
    "-n", "--tokens", type=click.IntRange(1), default=128, show_default=True, help="Generate at most that many."
)
@click.option("--temperature", type=click.FloatRange(0), default=0.8, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def run(file: Path, prompt: str, tokens: int, temperature: float, seed: int) -> None:
    """Continue a prompt with a GGUF FILE."""
    from d2q_edge.generate import generate

    pieces = generate(file, prompt, tokens, temperature, seed)
    click.echo(prompt, nl=False)
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()


@cli.group()
def runtime() -> None:
    """The patched llama-cpp-python that runs the files."""


@runtime.command()
@click.option("--tools", is_flag=True, help="Also build llama-quantize, llama-imatrix, llama-perplexity, llama-bench.")
def install(tools: bool) -> None:
    """Build the patched llama-cpp-python, once per machine, and install it in this environment."""
    from d2q_edge import runtime as patched

    patched.install(tools=tools)
    click.echo(patched.info().version)


@runtime.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(as_json: bool) -> None:
    """What is installed."""
    from d2q_edge import runtime as patched

    facts = patched.info().to_json()
    if as_json:
        click.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        click.echo(f"{name:12} {value if value else 'none'}")


def _write_json(path: Path, value: Any) -> None:
    try:
        path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise D2QError(f"can't write {path}: {error.strerror or error}") from error


def main() -> None:
    """The console script: runs the command and turns what happened into an exit code."""
    try:
        sys.exit(cli(standalone_mode=False))
    except D2QError as error:
        # Messages quote those of other libraries, which may have many lines.
        click.echo("Error: " + " ".join(str(error).split()), err=True)
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted. A conversion goes on where it stopped when the command is repeated.", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
