"""Give a checkpoint's tensors the names that transformers' causal language models have for them.

Wrapper modules of torch leave their names in those of a saved state: torch.compile `_orig_mod`, DistributedDataParallel
`module`, FSDP and activation checkpointing the others. The base model saved alone (`Qwen3Model.save_pretrained`) has no
`model.` in front. transformers reads both kinds, the latter since its base_model_prefix is "model".
"""

from collections.abc import Iterable
from typing import Any

from d2q_edge.errors import D2QError

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_PARALLEL = "module"
"""A wrapper's name in the first place only: elsewhere it may be a module's own."""
_BASE_MODEL = ("embed_tokens.", "layers.", "norm.")


def standard_names(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Return the stored name of every tensor by its standard name, in the given order, and notes about the difference.

    Raises:
        D2QError: two tensors would have the same name.
    """
    unwrapped: dict[str, str] = {}
    removed: dict[str, None] = {}
    for stored in names:
        kept: list[str] = []
        for part in stored.split("."):
            if part in _WRAPPERS or (part == _PARALLEL and not kept):
                removed[f"{part}."] = None
            else:
                kept.append(part)
        _add(unwrapped, ".".join(kept), stored)
    notes = [f"tensor names are read without {' and '.join(removed)}, a wrapper's prefix"] if removed else []
    if any(name.startswith(("model.", "language_model.")) for name in unwrapped):
        return unwrapped, notes
    full: dict[str, str] = {}
    for name, stored in unwrapped.items():
        _add(full, f"model.{name}" if name.startswith(_BASE_MODEL) else name, stored)
    if full != unwrapped:
        notes.append("tensor names have no model. in front, as those of a base model saved alone; it is added")
    return full, notes


def _add(found: dict[str, str], name: str, stored: str) -> None:
    if (other := found.setdefault(name, stored)) != stored:
        raise D2QError(f"the tensors {other} and {stored} would both be {name}; remove the one that isn't the model's")


def causal_architecture(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a base model saved alone as that of its language model, and any other one unchanged."""
    match config:
        case {"architectures": [str(name)], "model_type": str(model_type)} if not name.endswith("ForCausalLM"):
            from transformers.models.auto import modeling_auto

            if modeling_auto.MODEL_MAPPING_NAMES.get(model_type) == name:
                causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
                return {**config, "architectures": [causal or name]}
    return config
