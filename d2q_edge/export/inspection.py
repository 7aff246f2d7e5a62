"""Summarize a GGUF file, ours or a stock one: types, sizes, recipe, whether the installed runtime can load it."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

from d2q_edge import runtime
from d2q_edge.errors import printable
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.runtime.trial_load import why_not
from d2q_edge.utils.json_files import parse_json

BLOCK = re.compile(r"(?:\w+\.)?blk\.(\d+)\.(.+)")
"""Name of a tensor of a block in llama.cpp (src/llama-arch.cpp); encoders and vision parts have a prefix."""
EMBEDDINGS = ("token_embd", "position_embd", "token_types", "per_layer_token_embd")
HEADS = ("output.", "cls.")
PARTS = ("blocks", "embeddings", "head", "other")


def inspect(path: Path, *, try_to_load: bool = True) -> dict[str, Any]:
    """Summarize one file as plain values for json.dump.

    With `try_to_load` the installed runtime is asked whether it can load the file, which takes about a second.

    Returns:
        architecture, name, bytes, parameters, bits_per_weight (of all tensors), types (type name to tensors, bytes and
        elements, largest first), norm_biases (their number), recipe and table_sha256 (None in files that d2q-edge
        didn't quantize); parts (blocks, embeddings, head, other to the same three numbers; a tied head has none),
        metadata_bytes (everything but tensors: keys, tokenizer, padding), layers (a block's matrix to its types and how
        many blocks have it in that type), biased_norms (norm to how many have a bias), context_length, base_model,
        license, quantized_by, split (None, or which part of how many), runtime (version; runs: whether it can load the
        file, None if not asked; reason: why not).

    Raises:
        D2QError: the file can't be read, is malformed, or has blocks of ours with a scale that isn't finite.
    """
    file = GGUFFile(path)
    file.check_blocks()
    nothing = {"tensors": 0, "bytes": 0, "elements": 0}
    types: dict[str, dict[str, int]] = {}
    parts = {part: dict(nothing) for part in PARTS}
    for info in file.tensors.values():
        for entry in (types.setdefault(info.type_name, dict(nothing)), parts[part_of(info.name)]):
            entry["tensors"] += 1
            entry["bytes"] += info.nbytes
            entry["elements"] += info.elements
    biases = [name.removesuffix(".bias") for name in file.tensors if name.endswith("_norm.bias")]
    reason = why_not(path) if try_to_load else None
    return {
        "file": str(path),
        "architecture": file.kv.get("general.architecture"),
        "name": file.kv.get("general.name"),
        "bytes": file.size,
        "parameters": sum(entry["elements"] for entry in parts.values()),
        "bits_per_weight": file.bits_per_weight,
        "types": dict(sorted(types.items(), key=lambda item: -item[1]["bytes"])),
        "norm_biases": len(biases),
        "recipe": _parse(file.kv.get("d2q.recipe")),
        "table_sha256": file.kv.get("d2q.table_sha256"),
        "parts": parts,
        "metadata_bytes": file.size - sum(entry["bytes"] for entry in parts.values()),
        "layers": {layer: dict(Counter(blocks.values()).most_common()) for layer, blocks in allocation(file).items()},
        "biased_norms": dict(Counter(match[2] if (match := BLOCK.fullmatch(name)) else name for name in biases)),
        "context_length": file.context_length,
        "base_model": file.kv.get("general.base_model.0.name"),
        "license": file.kv.get("general.license"),
        "quantized_by": file.kv.get("general.quantized_by"),
        "split": _split(file),
        "runtime": {
            "version": runtime.info().version if try_to_load else None,
            "runs": reason is None if try_to_load else None,
            "reason": reason,
        },
    }


def part_of(name: str) -> str:
    """Return which of PARTS a tensor belongs to, by its name."""
    if BLOCK.fullmatch(name):
        return "blocks"
    if name.split(".")[0] in EMBEDDINGS:
        return "embeddings"
    return "head" if name.startswith(HEADS) else "other"


def allocation(file: GGUFFile) -> dict[str, dict[int, str]]:
    """Return the type of every matrix in the blocks ("attn_q", ...), by block number."""
    found: dict[str, dict[int, str]] = {}
    for info in file.tensors.values():
        match = BLOCK.fullmatch(info.name)
        if match and len(info.shape) > 1:
            found.setdefault(match[2].removesuffix(".weight"), {})[int(match[1])] = info.type_name
    return found


def describe(summary: dict[str, Any]) -> str:
    """Format a summary as a short text for people."""
    size, parts, split, found = summary["bytes"], summary["parts"], summary["split"], summary["runtime"]
    header = f"{'tensors':>7} {'bytes':>15} {'bits/weight':>11} {'share':>6}"
    lines = [
        f"{summary['file']}: {summary['name'] or 'unnamed'} ({summary['architecture'] or 'unknown architecture'})",
        f"{size:,} bytes, {summary['parameters']:,} parameters, {summary['bits_per_weight']:.3f} bits per weight",
    ]
    if split:
        lines.append(f"part {split['part']} of {split['of']} of a split file")
    lines += ["", f"{'type':20} {header}", *(_row(name, entry, size) for name, entry in summary["types"].items())]
    lines += ["", f"{'part':20} {header}"]
    lines += [_row(name, entry, size) for name, entry in parts.items() if entry["tensors"]]
    lines += [_row("keys and tokenizer", {"tensors": 0, "bytes": summary["metadata_bytes"], "elements": 0}, size)]
    if not parts["head"]["tensors"] and parts["embeddings"]["tensors"]:
        lines.append("the embeddings serve as the head, too")
    lines.append("")
    if any(len(kinds) > 1 for kinds in summary["layers"].values()):
        lines += ["types in the blocks:"]
        lines += [f"  {layer}: {_counts(kinds)}" for layer, kinds in summary["layers"].items()]
    if summary["biased_norms"]:
        lines.append(f"norm biases: {_counts(summary['biased_norms'])}")
    if summary["recipe"]:
        recipe = {key: f"{value:.12}..." if "sha256" in key else value for key, value in summary["recipe"].items()}
        lines.append("recipe: " + ", ".join(f"{key} {value}" for key, value in recipe.items()))
    for key in ("base_model", "license", "quantized_by", "context_length"):
        if summary[key]:
            lines.append(f"{key.replace('_', ' ')}: {summary[key]}")
    if found["runs"]:
        lines.append(f"runtime: llama-cpp-python {found['version']} can run it")
    elif found["runs"] is False:
        lines.append(f"runtime: can't run it here: {found['reason']}")
    return "\n".join(printable(line) for line in lines)


def _split(file: GGUFFile) -> dict[str, int] | None:
    number, count = file.kv.get("split.no", 0), file.kv.get("split.count", 1)
    if not isinstance(number, int) or not isinstance(count, int) or count < 2:
        return None
    return {"part": number + 1, "of": count}


def _row(name: str, entry: dict[str, int], total: int) -> str:
    bits = f"{8 * entry['bytes'] / entry['elements']:.4f}" if entry["elements"] else ""
    tensors = f"{entry['tensors']}" if entry["tensors"] else ""
    return f"{name:20} {tensors:>7} {entry['bytes']:15,} {bits:>11} {entry['bytes'] / total:6.1%}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in counts.items())


def _parse(recipe: Any) -> dict[str, Any] | None:
    try:
        parsed = parse_json(recipe.encode())
    except (AttributeError, ValueError):
        return None
    return parsed if isinstance(parsed, dict) else None
