"""Write a model card (README.md with YAML metadata, as the Hugging Face hub has it) for a finished file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from d2q_edge import __version__
from d2q_edge.errors import D2QError
from d2q_edge.export.inspection import inspect
from d2q_edge.formats import tensor_types
from d2q_edge.formats.gguf_reader import GGUFFile

NAME = "README.md"
OWN = "quantized_by: d2q-edge"
"""A line that no other README.md has."""


def check_card(output: Path, *, force: bool) -> None:
    """Check before the work that a card can be written beside a file; `force` replaces only cards of ours.

    Raises:
        D2QError: there is a README.md that may not be replaced.
    """
    card = output.parent / NAME
    if not card.exists():
        return
    try:
        own = OWN in card.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        own = False
    if not own:
        raise D2QError(f"{card} exists and isn't a model card of d2q-edge; write the file into a directory of its own")
    if not force:
        raise D2QError(f"{card} exists already; use --force to replace it")


def write_card(output: Path, report: Mapping[str, Any]) -> Path:
    """Write the card beside a finished file, with what its conversion measured (`Conversion.to_json`); return its path.

    Raises:
        D2QError: the file can't be read, or the card can't be written.
    """
    card = output.parent / NAME
    try:
        card.write_text(model_card(output, report), encoding="utf-8")
    except OSError as error:
        raise D2QError(f"can't write {card}: {error.strerror or error}") from error
    return card


def model_card(path: Path, report: Mapping[str, Any]) -> str:
    """Return the text that `write_card` writes, or raise a D2QError where the file can't be read."""
    summary, kv = inspect(path, try_to_load=False), GGUFFile(path).kv
    base = _base_model(kv)
    own = [name for name in summary["types"] if name in tensor_types.BY_NAME]
    title = summary["name"] or path.stem
    link = f"[{base}](https://huggingface.co/{base})" if base else title
    blocks = summary["parts"]["blocks"]
    block_bits = 8 * blocks["bytes"] / blocks["elements"] if blocks["elements"] else 0.0
    front = ModelCardData(
        base_model=base,
        base_model_relation="quantized" if base else None,
        library_name="gguf",
        license=_text(kv, "general.license"),
        license_name=_text(kv, "general.license.name"),
        license_link=_text(kv, "general.license.link"),
        language=kv.get("general.languages"),
        pipeline_tag="text-generation",
        tags=["gguf", "d2q-edge", "quantized", *own],
        quantized_by="d2q-edge",
    ).to_yaml()
    sections = [
        f"---\n{front}\n---",
        f"# {title} in {summary['bits_per_weight']:.2f} bits per weight",
        f"A GGUF file of {link} for the CPU of a laptop or a phone, made by d2q-edge {__version__}.",
        "| File | Bytes | Bits per weight | Bits per weight in the blocks |\n|---|---:|---:|---:|\n"
        f"| {path.name} | {summary['bytes']:,} | {summary['bits_per_weight']:.3f} | {block_bits:.3f} |",
        *_runtime(path.name, own),
        *_measured(path.name, report),
        "## What is in it",
        "| Type | Tensors | Bytes | Bits per weight |\n|---|---:|---:|---:|\n"
        + "\n".join(
            f"| {name} | {entry['tensors']} | {entry['bytes']:,} | {8 * entry['bytes'] / entry['elements']:.4f} |"
            for name, entry in summary["types"].items()
        ),
    ]
    if summary["recipe"]:
        rows = "\n".join(f"| {key} | {value} |" for key, value in summary["recipe"].items())
        sections += ["## How it was made", f"| Setting | Value |\n|---|---|\n{rows}"]
    return "\n\n".join(sections) + "\n"


def _base_model(kv: Mapping[str, Any]) -> str | None:
    """Return the original's name on the hub, if the file has it."""
    for key in ("general.base_model.0.repo_url", "general.source.repo_url", "general.repo_url"):
        url = _text(kv, key)
        if url and "huggingface.co/" in url:
            return "/".join(url.partition("huggingface.co/")[2].strip("/").split("/")[:2])
    return None


def _text(kv: Mapping[str, Any], key: str) -> str | None:
    value = kv.get(key)
    return value if isinstance(value, str) and value else None


def _runtime(file: str, own: list[str]) -> list[str]:
    types = f"It has tensors of our types ({' and '.join(own)}), " if own else ""
    refuse = "which stock llama.cpp and programs built on it refuse to load. " if own else ""
    return [
        "## How to run it",
        f"{types}{refuse}The patched llama-cpp-python that d2q-edge builds runs it:",
        f"""```sh
pip install d2q-edge
d2q-edge runtime install                  # once: builds the patched llama-cpp-python
d2q-edge run {file} -p "Once upon a time"
d2q-edge chat {file}
d2q-edge serve {file}                 # an OpenAI-compatible server
```""",
    ]


def _measured(file: str, report: Mapping[str, Any]) -> list[str]:
    sections = ["## How near it is to the original"]
    if found := report.get("validation"):
        sections.append(
            f"KL divergence of its predictions from the original's on {found['tokens']:,} tokens of calibration text "
            f"kept for validation: **{found['kl_divergence']:.4f}** ± {found['kl_divergence_stderr']:.4f} nats per "
            f"token; the most likely token is the same in {found['top1_agreement']:.1%} of them. (Estimated while "
            "converting, with embeddings and head unrounded.)"
        )
    if found := report.get("refinement"):
        what = "KL divergence" if found["scope"] == "model" else "mean squared error of the blocks' outputs"
        sections.append(f"Tuning brought the {what} from {found['before']:.4f} to {found['after']:.4f} on other text.")
    return [
        *sections,
        "To measure it on your own text, against a file that `d2q-edge convert --type f16` makes:",
        f"```sh\nd2q-edge eval {file} --reference original-f16.gguf --text your.txt\n```",
    ]
