"""Read a LoRA adapter as peft saves it, and compute the weights that it makes of a model's.

W becomes W + scale * B A (LoRA, arXiv 2106.09685) with scale = lora_alpha / r, or lora_alpha / sqrt(r) (rsLoRA, arXiv
2312.03732). DoRA (arXiv 2402.09353) then gives each row of the sum the norm that it has learned. Tensors that were
trained in full (`modules_to_save`, `bias`) replace the model's.

Source: peft, tuners/lora/layer.py and dora.py (get_delta_weight, merging), utils/save_and_load.py (names) and
utils/other.py (get_pattern_key). fan_in_fan_out is for layers that no supported family has; peft ignores it elsewhere.
"""

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from d2q_edge.errors import D2QError
from d2q_edge.model.links import check_links
from d2q_edge.model.multimodal import text_names
from d2q_edge.model.peft_files import CONFIG, adapter_files, base_model
from d2q_edge.model.tensor_names import standard_names
from d2q_edge.model.weight_files import DTYPES, TensorEntry, read_header
from d2q_edge.utils.json_files import read_json_object

_PART = re.compile(r"(.+)\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(?:\.default)?(?:\.weight)?")
_PREFIX = "base_model.model."
_UNSUPPORTED = (
    *("layer_replication", "lora_bias", "target_parameters", "trainable_token_indices", "alora_invocation_tokens"),
    *("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
)
"""Settings that change what a LoRA layer computes in other ways."""
_INITIAL = ("gaussian", "eva", "orthogonal")
"""Values of init_lora_weights beside true and false that leave the model's own weights alone."""


@dataclass(frozen=True)
class Lora:
    """The change of one weight."""

    a: TensorEntry  # [rank, in_features]; of an embedding [rank, tokens]
    b: TensorEntry  # [out_features, rank]; of an embedding [channels, rank]
    scale: float
    magnitude: TensorEntry | None  # DoRA's, [out_features] or [channels]
    is_embedding: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that it changes."""
        shape = self.b.shape[0], self.a.shape[1]
        return shape[::-1] if self.is_embedding else shape

    def merge(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the new weight in float32 for the old one in any dtype; a float32 one is changed in place."""
        merged = weight.float()
        # An embedding's weight is transposed: it has tokens for rows.
        rows = merged.T if self.is_embedding else merged
        rows.addmm_(read(self.b).float(), read(self.a).float(), alpha=self.scale)
        if self.magnitude is not None:
            rows.mul_((read(self.magnitude).float().flatten() / torch.linalg.norm(rows, dim=1))[:, None])
        return merged


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        directory: that it is in.
        base: the model that it was trained on, as it says.
        loras: by the names of the weights that they change, as in a checkpoint.
        replacements: tensors that were trained in full.
        tied: whether tied embeddings were kept tied in training (ensure_weight_tying).
        notes: about what was left out.
    """

    directory: Path
    base: str | None
    loras: Mapping[str, Lora]
    replacements: Mapping[str, TensorEntry]
    tied: bool
    notes: tuple[str, ...]


def read(entry: TensorEntry) -> torch.Tensor:
    """Load a tensor of an adapter; raise D2QError if it can't be read, or holds NaN or infinity."""
    tensor = entry.load()
    if not bool(tensor.isfinite().all()):
        raise D2QError(f"tensor {entry.name} in {entry.file} contains NaN or infinite values; the adapter is damaged")
    return tensor


def read_adapter(adapter: str) -> Adapter:
    """Read the config of an adapter, given by its directory or its id of the hub, and the header of its weights.

    Raises:
        D2QError: a file is missing, damaged or a pickle; the adapter isn't a LoRA, or has settings that aren't
            supported; its tensors contradict each other or the settings.
    """
    config_file, weights = adapter_files(adapter)
    directory = weights.parent
    check_links(directory)
    config = read_json_object(config_file, strict=True)
    _check_settings(directory, config)
    stored = read_header(weights)
    names, notes = _names(stored)
    parts: dict[str, dict[str, str]] = {}
    replacements = {}
    for name, key in names.items():
        if stored[key].dtype not in DTYPES:
            raise D2QError(f"tensor {key} in {weights} has dtype {stored[key].dtype}, which no LoRA adapter has")
        if match := _PART.fullmatch(name):
            parts.setdefault(match[1], {})[match[2]] = key
        elif ".original_module." not in name:
            replacements[re.sub(r"\.(modules_to_save(\.default)?|base_layer)(?=\.)", "", name)] = stored[key]
    if not parts and not replacements:
        raise D2QError(f"{weights} holds no tensors; the adapter changes nothing")
    loras = {f"{module}.weight": _lora(directory, module, keys, stored, config) for module, keys in parts.items()}
    tied = config.get("ensure_weight_tying") is True
    return Adapter(directory, base_model(config), loras, replacements, tied, tuple(notes))


def _names(stored: Mapping[str, TensorEntry]) -> tuple[dict[str, str], list[str]]:
    """Return the stored names by those in a checkpoint of the language model, and notes."""
    plain = {name.removeprefix(_PREFIX): name for name in stored}
    standard, _ = standard_names(plain)
    texts = text_names(standard)
    notes = ["the adapter's part for images is left out"] if len(texts) < len(standard) else []
    return {name: plain[standard[full]] for name, full in texts.items()}, notes


def _check_settings(directory: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise D2QError(
            f"{directory} is an adapter of the type {kind!r:.40}; only LoRA can be merged here, so merge it with peft "
            "(merge_and_unload) if it can, and convert the result"
        )
    initial = config.get("init_lora_weights")
    if isinstance(initial, str) and initial not in _INITIAL:
        raise D2QError(
            f"{directory}: init_lora_weights is {initial!r:.40}, which changes the model's own weights too; let peft "
            "save the adapter as an ordinary LoRA (path_initial_model_for_weight_conversion)"
        )
    for key in _UNSUPPORTED:
        if config.get(key):
            raise D2QError(
                f"{directory}: {key} in {CONFIG} isn't supported; merge the adapter with peft (merge_and_unload) and "
                "convert the result"
            )


def _lora(
    directory: Path, module: str, keys: Mapping[str, str], stored: Mapping[str, TensorEntry], config: Mapping[str, Any]
) -> Lora:
    """Check the parts of one layer's LoRA, by the last part of their names, and compute its scale."""
    magnitude = stored[keys["magnitude_vector"]] if "magnitude_vector" in keys else None
    kinds = keys.keys() - {"magnitude_vector"}
    if kinds not in ({"A", "B"}, {"embedding_A", "embedding_B"}) or (magnitude is None) == bool(config.get("use_dora")):
        raise D2QError(f"{directory}: the adapter of {module} isn't complete, or contradicts {CONFIG}")
    a, b = (stored[keys[kind]] for kind in sorted(kinds))
    name = next(iter(keys.values())).removeprefix(_PREFIX).partition(".lora_")[0]
    rank = _by_pattern(directory, config, "rank_pattern", name, config.get("r"))
    alpha = _by_pattern(directory, config, "alpha_pattern", name, config.get("lora_alpha"))
    if type(rank) is not int or rank < 1:
        raise D2QError(f"{directory}: the rank of an adapter must be a positive whole number, not {rank!r:.40}")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) <= sys.float_info.max:
        raise D2QError(f"{directory}: lora_alpha must be a number, not {alpha!r:.40}")
    if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == rank:
        raise D2QError(
            f"{directory}: the adapter of {module} has matrices of the shapes {list(a.shape)} and {list(b.shape)}, but "
            f"{CONFIG} says that its rank is {rank}"
        )
    if magnitude is not None and math.prod(magnitude.shape) != b.shape[0]:
        raise D2QError(f"{directory}: the adapter of {module} has magnitudes of shape {list(magnitude.shape)}")
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Lora(a, b, scale, magnitude, "embedding_A" in kinds)


def _by_pattern(directory: Path, config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """Return the value of the first pattern that a module's name, or its end, matches; else the default.

    Patterns are regular expressions, which untrusted files must not make us run; those in use are plain names.
    """
    patterns = config.get(key) or {}
    if not isinstance(patterns, Mapping):
        raise D2QError(f"{directory}: {key} must be an object")
    for pattern, value in patterns.items():
        name = pattern.replace("\\.", ".").removesuffix("$")
        if not re.fullmatch(r"\^?[\w.-]+", name):
            raise D2QError(
                f"{directory}: {key} has the pattern {pattern!r:.80}, but only names of modules are supported; merge "
                "the adapter with peft (merge_and_unload) and convert the result"
            )
        if name.removeprefix("^") == module or (not name.startswith("^") and module.endswith(f".{name}")):
            return value
    return default
