"""Parse and run `d2q-edge convert`."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from d2q_edge.cli.common import PATH, Number, field_option, wait_passively
from d2q_edge.distributed.launch import is_main, is_worker, launch
from d2q_edge.errors import D2QError
from d2q_edge.options import (
    CPU_TOKENS,
    GPU_TOKENS,
    HIGHEST_BITS,
    LOWEST_BITS,
    MIN_CONTEXT,
    REFINE_SCOPES,
    ROTATIONS,
    Options,
)

option = partial(field_option, Options)
OF_EXPORT = frozenset({"model", "revision", "adapter", "output", "stock_type", "pre_tokenizer", "no_verify", "force"})
"""Parameters that --type heeds; it would silently ignore any other."""
OF_CALIBRATION = frozenset({"calibration", "calibration_tokens", "context", "dsq", "dac", "guidance"})
"""Parameters without effect under --no-calibration; the library itself refuses --refine and mixtures there."""


@click.command("convert")
@click.argument("model", type=PATH)
@click.option("--revision", help="Branch, tag or commit of a Hugging Face id.  [default: main]")
@click.option("-o", "--output", type=PATH, help="The GGUF file to write.  [default: named after the model]")
@option("adapter", metavar="DIR|ID", help="LoRA adapter of PEFT to merge into the model first.")
@option("bits", type=float, help=f"2, 3, or a mean of {LOWEST_BITS} to {HIGHEST_BITS} bits per weight.")
@click.option("--type", "stock_type", help="Write a stock type (f16, q8_0, ...) instead of quantizing.")
@option(
    "calibration",
    multiple=True,
    metavar="FILE[:WEIGHT]",
    help="Text, or .jsonl of conversations, to calibrate on; several are mixed.",
)
@option(
    "calibration_tokens",
    type=click.IntRange(1),
    metavar="N",
    help=f"Tokens to calibrate on at most.  [default: {CPU_TOKENS:,} on a CPU, {GPU_TOKENS:,} on a GPU]",
)
@option("context", type=click.IntRange(MIN_CONTEXT), help="Tokens per calibration window.")
@option("seed", type=click.IntRange(0), help="Seed of all random choices.")
@option("rotation", type=click.Choice(ROTATIONS), help="Spread outliers; unties tied embeddings.")
@option("dsq", help="Scale columns, at no cost in size.")
@option("dac", help="Correct the mean shift by norm biases.")
@option("guidance", help="Let gradients guide the rounding.")
@option("refine", help="Tune scales and codes by gradients: better, and slower.")
@option("refine_scope", type=click.Choice(REFINE_SCOPES), help="What is tuned together: a model wants a GPU.")
@click.option("--no-calibration", is_flag=True, help="Round to nearest: fast, and worse.")
@option("embedding_type", help="Stock type of the embeddings.  [default: by --bits]")
@option("head_type", help="Stock type of an untied lm_head.  [default: by --bits]")
@option("per_layer_type", help="Type of per-layer embeddings (Gemma 4).")
@option("device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), help="Device to quantize on.")
@click.option("--gpus", type=click.IntRange(1), default=1, help="GPUs that share the work.")
@option("memory_limit", type=Number(0.5), metavar="GIB", help="Memory to use at most.  [default: what is free]")
@option("pre_tokenizer", metavar="NAME", help="llama.cpp's name of the pre-tokenizer, if unrecognized.")
@click.option("--no-verify", is_flag=True, help="Keep a file that llama.cpp tokenizes differently.")
@click.option("--dry-run", is_flag=True, help="Print time, memory and exact file size only.")
@click.option("--force", is_flag=True, help="Replace an existing file, or other unfinished work.")
@click.option("--report", type=PATH, help="Write the measurements to a JSON file.")
@click.option("--model-card", is_flag=True, help="Write a model card, README.md, beside the file.")
def command(
    model: Path,
    revision: str | None,
    output: Path | None,
    stock_type: str | None,
    gpus: int,
    no_calibration: bool,
    no_verify: bool,
    force: bool,
    dry_run: bool,
    report: Path | None,
    model_card: bool,
    **fields: Any,
) -> None:
    """Quantize a Hugging Face checkpoint into a GGUF file.

    MODEL is a directory, a GGUF file of a stock type, or an id like Qwen/Qwen3-8B, which is downloaded into the Hugging
    Face cache. For gated and private models, set HF_TOKEN.
    """
    wait_passively()
    ctx = click.get_current_context()
    given = [name for name in ctx.params if ctx.get_parameter_source(name) != ParameterSource.DEFAULT]
    ignored = OF_CALIBRATION if stock_type is None and no_calibration else frozenset()
    for name in given:
        if name in ignored or (stock_type is not None and name not in OF_EXPORT):
            reason = "--no-calibration reads no text" if stock_type is None else "--type writes a stock file"
            flag = f"--{'no-' if fields.get(name) is False else ''}{name.replace('_', '-')}"
            raise click.UsageError(f"{reason}; it can't be used with {flag}")
    if gpus > 1:
        if fields["device"] not in ("auto", "cuda"):
            raise click.UsageError(f"--gpus needs CUDA devices; it can't be used with --device {fields['device']}")
        fields["device"] = "cuda"
    gibibytes = fields["memory_limit"]
    fields["memory_limit"] = None if gibibytes is None else int(gibibytes * 2**30)
    options = Options(calibrate=not no_calibration, **fields)
    # Without calibration, there is no work to share.
    if gpus > 1 and options.calibrate and stock_type is None and not dry_run and not is_worker():
        launch(gpus, [sys.executable, "-m", "d2q_edge.cli", *sys.argv[1:]])
        return

    from d2q_edge.export import model_file
    from d2q_edge.model.checkpoint import Checkpoint
    from d2q_edge.model.families import family_for
    from d2q_edge.model.hub import locate
    from d2q_edge.model.peft_files import locate_adapter

    model = locate(model, revision)
    if options.adapter is not None:
        options = replace(options, adapter=str(locate_adapter(options.adapter)))
    if output is None:
        checkpoint = Checkpoint.open(model)
        encoding = stock_type or f"D2Q{options.bits:g}"
        output = Path(model_file.file_name(checkpoint, family_for(checkpoint.config), encoding))
    how = {"force": force, "verify": not no_verify}
    if stock_type is None:
        _quantize(model, output, options, report, model_card, dry_run=dry_run, **how)
    else:
        size = model_file.export(
            model, output, stock_type.lower(), adapter=options.adapter, pre_tokenizer=options.pre_tokenizer, **how
        )
        click.echo(f"{output}: {size:,} bytes")


def _quantize(
    model: Path, output: Path, options: Options, report: Path | None, model_card: bool, *, dry_run: bool, **how: bool
) -> None:
    """Quantize, and write the report and the model card."""
    from d2q_edge.conversion import convert
    from d2q_edge.export.conversion_report import fingerprint
    from d2q_edge.export.model_card import NAME, check_card, write_card
    from d2q_edge.export.targets import check_targets
    from d2q_edge.formats.gguf_writer import check_output
    from d2q_edge.model.peft_files import adapter_files

    card = output.parent / NAME if model_card else None
    targets = {"the output": output, "the report": report, "the model card": card}
    # All this before the work, which takes long.
    read = [] if options.adapter is None else adapter_files(options.adapter)
    check_targets({name: path for name, path in targets.items() if path is not None}, model, read)
    if report and is_main():
        check_output(report, force=how["force"])
    if card:
        check_card(output, force=how["force"])
    conversion = convert(model, output, options, dry_run=dry_run, **how)
    if not is_main():
        return
    values = conversion.to_json()
    if report:
        found = {} if dry_run else {"fingerprint": fingerprint(output)}
        try:
            report.write_text(json.dumps({**values, **found}, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise D2QError(f"can't write {report}: {error.strerror or error}") from error
    if card and not dry_run:
        write_card(output, values)
    click.echo(conversion.describe(output))
