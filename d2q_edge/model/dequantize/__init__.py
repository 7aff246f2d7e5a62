"""Read quantized checkpoints as if they weren't: each weight is dequantized to float32 when it is loaded."""

from collections.abc import Mapping
from typing import Any

from d2q_edge.errors import D2QError
from d2q_edge.model.dequantize import awq, compressed_tensors, fp8, gptq
from d2q_edge.model.dequantize.entry import DequantizedEntry, Format
from d2q_edge.model.weight_files import DTYPES, IGNORED_SUFFIXES, TensorEntry

_FORMATS: dict[str, Format] = {
    **dict.fromkeys(("fp8", "fbgemm_fp8", "modelopt"), fp8),
    "compressed-tensors": compressed_tensors,
    "gptq": gptq,
    "awq": awq,
}
"""By config.json's quant_method."""
_SETTINGS = ("quantization_config", "compression_config")
"""The entry of config.json that says how the checkpoint is quantized; the second is an older name."""


def ordinary_weights(
    config: Mapping[str, Any], entries: Mapping[str, TensorEntry]
) -> tuple[dict[str, Any], dict[str, TensorEntry], list[str]]:
    """Return a config and entries that show a checkpoint as an unquantized one, and notes about what that means.

    Raises:
        D2QError: it is quantized in a way that isn't supported, or its tensors contradict each other or the config.
    """
    settings = next((config[key] for key in _SETTINGS if config.get(key)), None)
    config = {key: value for key, value in config.items() if key not in _SETTINGS}
    if settings is None:
        if any(name.endswith(".qweight") for name in entries):
            raise D2QError(
                "the weights are quantized (there are qweight tensors), but config.json has no quantization_config to "
                "say how; use the unquantized checkpoint"
            )
        return config, dict(entries), []
    if not isinstance(settings, Mapping):
        raise D2QError("config.json: quantization_config must be an object")
    method = _method(settings)
    if all(entry.dtype in DTYPES or name.endswith(IGNORED_SUFFIXES) for name, entry in entries.items()):
        note = f"config.json has a quantization_config ({method}), which is ignored: the weights aren't quantized"
        return config, dict(entries), [note]
    shown, codes = _dequantized(_FORMATS.get(method), settings, entries)
    if not codes:
        raise D2QError(
            f"the checkpoint is quantized with {method} in a way that can't be dequantized here; use the unquantized "
            "checkpoint that it was made from"
        )
    note = f"the weights are stored as {' and '.join(sorted(codes))} (quant_method {method}) and are dequantized"
    if codes != {"fp8"}:
        note += "; what they lost stays lost, so convert the original 16-bit checkpoint if you can get it"
    return config, shown, [note]


def _method(settings: Mapping[str, Any]) -> str:
    """Return the method's name; bitsandbytes didn't always write its own."""
    if isinstance(method := settings.get("quant_method"), str):
        return method
    return "bitsandbytes" if "load_in_4bit" in settings or "load_in_8bit" in settings else "an unnamed method"


def _dequantized(
    kind: Format | None, settings: Mapping[str, Any], entries: Mapping[str, TensorEntry]
) -> tuple[dict[str, TensorEntry], set[str]]:
    """Return what to show in place of the entries, in their order, and the codes of the weights that are quantized."""
    if kind is None:
        return {}, set()
    modules: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in entries.items():
        module, _, leaf = name.rpartition(".")
        modules.setdefault(module, {})[leaf] = entry
    weights: dict[str, DequantizedEntry] = {}
    for module, parts in modules.items():
        if (weight := kind.weight(module, parts, settings)) is not None:
            weights[module] = weight
    shown: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        module, _, leaf = name.rpartition(".")
        if module in weights and (leaf in kind.PARTS or leaf == "weight"):
            shown[f"{module}.weight"] = weights[module]
        elif leaf not in kind.PARTS and not (kind is gptq and module in weights and _is_filler(leaf, entry)):
            shown[name] = entry
    return shown, {weight.code for weight in weights.values()}


def _is_filler(leaf: str, entry: TensorEntry) -> bool:
    """Return whether a tensor is a bias of zeros; AutoGPTQ gave one to every layer for a time."""
    return leaf == "bias" and entry.dtype in DTYPES and not entry.load().any()
