"""What a GGUF file holds: types, sizes, recipe. Works on stock files too, and needs no runtime."""

from pathlib import Path
from typing import Any

from d2q_edge.gguf_reader import GGUFFile
from d2q_edge.json_files import parse_json


def inspect(path: Path) -> dict[str, Any]:
    """Facts about one file, as plain values for json.dump.

    Returns:
        architecture, name, bytes, parameters, bits_per_weight (of all tensors), types (type name to tensors, bytes and
        elements, largest first), norm_biases (number of mean-shift tensors), recipe and table_sha256 (None in files
        that d2q-edge didn't quantize).

    Raises:
        D2QError: the file can't be read, is malformed, or has blocks of ours that can't be used.
    """
    file = GGUFFile(path)
    file.check_blocks()
    types: dict[str, dict[str, int]] = {}
    for info in file.tensors.values():
        entry = types.setdefault(info.type_name, {"tensors": 0, "bytes": 0, "elements": 0})
        entry["tensors"] += 1
        entry["bytes"] += info.nbytes
        entry["elements"] += info.elements
    return {
        "file": str(path),
        "architecture": file.kv.get("general.architecture"),
        "name": file.kv.get("general.name"),
        "bytes": file.size,
        "parameters": sum(entry["elements"] for entry in types.values()),
        "bits_per_weight": file.bits_per_weight,
        "types": dict(sorted(types.items(), key=lambda item: -item[1]["bytes"])),
        "norm_biases": sum(name.endswith("_norm.bias") for name in file.tensors),
        "recipe": _parse(file.kv.get("d2q.recipe")),
        "table_sha256": file.kv.get("d2q.table_sha256"),
    }


def describe(facts: dict[str, Any]) -> str:
    """The same facts as a short text for people."""
    lines = [
        f"{facts['file']}: {facts['name'] or 'unnamed'} ({facts['architecture'] or 'unknown architecture'})",
        f"{facts['bytes']:,} bytes, {facts['parameters']:,} parameters, {facts['bits_per_weight']:.3f} bits per weight",
        "",
        f"{'type':10} {'tensors':>7} {'bytes':>15} {'bits/weight':>11}",
    ]
    for name, entry in facts["types"].items():
        bits = 8 * entry["bytes"] / entry["elements"]
        lines.append(f"{name:10} {entry['tensors']:7} {entry['bytes']:15,} {bits:11.4f}")
    if facts["recipe"]:
        lines += ["", "recipe: " + ", ".join(f"{key} {value}" for key, value in facts["recipe"].items())]
    return "\n".join(lines)


def _parse(recipe: Any) -> dict[str, Any] | None:
    try:
        parsed = parse_json(recipe.encode())
    except (AttributeError, ValueError):
        return None
    return parsed if isinstance(parsed, dict) else None
