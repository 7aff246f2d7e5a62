"""`d2q-edge convert`."""

import sys
from pathlib import Path
from typing import Any

import click

from d2q_edge.cli.common import PATH, Number, is_first_process, wait_passively, write_json
from d2q_edge.distributed.launch import together


@click.command("convert")
@click.argument("model", type=PATH)
@click.option("--revision", help="Branch, tag or commit of a Hugging Face id.  [default: main]")
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
@click.option("--gpus", type=click.IntRange(1), default=1, show_default=True, help="That many share the work.")
@click.option("--memory-limit", type=Number(0.5), help="GiB of memory that may be taken.  [default: what is free]")
@click.option(
    "--pre-tokenizer", metavar="NAME", help="llama.cpp's name for how the tokenizer splits text, where it isn't known."
)
@click.option("--no-verify", is_flag=True, help="Keep a file whose tokenizer differs from the model's in llama.cpp.")
@click.option("--dry-run", is_flag=True, help="Print the plan and the exact size; convert nothing.")
@click.option("--force", is_flag=True, help="Replace an existing file, or unfinished work with other options.")
@click.option("--report", type=PATH, help="Write what was measured to a JSON file.")
@click.option("--model-card", is_flag=True, help="Write README.md beside the file, as GGUF repositories have it.")
def command(model: Path, output: Path | None, stock_type: str | None, gpus: int, **options: Any) -> None:
    """Quantize a Hugging Face checkpoint into a GGUF file.

    MODEL is a directory, or an id like Qwen/Qwen3-8B, which is fetched into the cache of the Hugging Face hub. For
    gated and private models, HF_TOKEN holds the token.
    """
    wait_passively()
    if gpus > 1:
        if options["device"] not in ("auto", "cuda"):
            raise click.UsageError(
                f"--gpus shares the work among CUDA devices; it doesn't go with --device {options['device']}"
            )
        options["device"] = "cuda"
    # What takes no calibration is done by one.
    alone = stock_type is not None or options["dry_run"] or options["no_calibration"]
    with together(1 if alone else gpus, [sys.executable, "-m", "d2q_edge.cli", *sys.argv[1:]]):
        _convert(model, output, stock_type, options)


def _convert(model: Path, output: Path | None, stock_type: str | None, options: dict[str, Any]) -> None:
    from d2q_edge.conversion import convert as quantize
    from d2q_edge.export import model_file
    from d2q_edge.export.conversion_report import fingerprint
    from d2q_edge.export.model_card import NAME, check_card, write_card
    from d2q_edge.export.targets import check_targets
    from d2q_edge.formats.gguf_writer import check_output
    from d2q_edge.model.checkpoint import Checkpoint
    from d2q_edge.model.families import family_for
    from d2q_edge.model.hub import locate
    from d2q_edge.options import Options

    bits, force, report, card = options["bits"], options["force"], options["report"], options["model_card"]
    if stock_type is not None:
        ours = "bits", "no_calibration", "embedding_type", "head_type", "refine", "dry_run", "report", "model_card"
        for option in ours:
            if options[option]:
                raise click.UsageError(f"--type writes a stock file; it doesn't go with --{option.replace('_', '-')}")
        if options["rotation"] == "on":
            raise click.UsageError("--type writes a stock file; it doesn't go with --rotation on")
    bits = 2 if bits is None else int(bits) if bits in (2, 3) else bits
    model = locate(model, options["revision"])
    if output is None:
        checkpoint = Checkpoint.open(model)
        output = Path(model_file.file_name(checkpoint, family_for(checkpoint.config), stock_type or f"D2Q{bits:g}"))
    if stock_type is not None:
        size = model_file.export(
            model,
            output,
            stock_type.lower(),
            force=force,
            pre_tokenizer=options["pre_tokenizer"],
            verify=not options["no_verify"],
        )
        click.echo(f"{output}: {size:,} bytes")
        return
    limit = options["memory_limit"]
    chosen = Options(
        bits=bits,
        memory_limit=None if limit is None else int(limit * 2**30),
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
                "pre_tokenizer",
            )
        },
    )
    # Better now than after the work.
    targets = {"the output": output, "the report": report, "the model card": output.parent / NAME if card else None}
    check_targets({name: path for name, path in targets.items() if path is not None}, model)
    if report and is_first_process():
        check_output(report, force=force)
    if card:
        check_card(output, force=force)
    result = quantize(model, output, chosen, dry_run=options["dry_run"], force=force, verify=not options["no_verify"])
    if not is_first_process():
        return
    if report:
        known = {} if options["dry_run"] else {"fingerprint": fingerprint(output)}
        write_json(report, {**result.to_json(), **known})
    if card and not options["dry_run"]:
        write_card(output, result.to_json())
    click.echo(result.describe(output))
