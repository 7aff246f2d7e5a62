"""The language model inside a checkpoint that also takes images: Gemma 3 from 4B on.

Knows how such a checkpoint wraps what otherwise would be one of its own: config.json's text_config, which leaves out
most of what is transformers' default, and names with a prefix, an older and a newer one. The eyes are left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from d2q_edge.errors import D2QError
from d2q_edge.model.families.base import MAX_LAYERS

TEXT_MODELS = {"Gemma3ForConditionalGeneration": ("Gemma3ForCausalLM", "gemma3_text")}
"""Architecture to that of its text part, and the latter's model_type."""
_WITHOUT_TEXT = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def has_text_part(config: dict[str, Any]) -> bool:
    """Whether config.json describes such a checkpoint."""
    architectures = config.get("architectures")
    return isinstance(architectures, list) and any(architectures[:1] == [name] for name in TEXT_MODELS)


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """What config.json would be for the text part alone.

    Raises:
        D2QError: it makes no sense.
    """
    from transformers import AutoConfig

    architecture, model_type = TEXT_MODELS[config["architectures"][0]]
    settings = config.get("text_config")
    if not isinstance(settings, dict):
        raise D2QError("config.json has no text_config, which describes the part of the model that is for text")
    if (layers := settings.get("num_hidden_layers")) is not None and (type(layers) is not int or layers > MAX_LAYERS):
        # transformers would make a list of so many kinds of layers.
        raise D2QError(f"config.json: text_config's num_hidden_layers makes no sense: {layers!r:.40}")
    try:
        complete = AutoConfig.for_model(**{**settings, "model_type": model_type}).to_dict()
    except Exception as error:
        # There is no one exception for what can be wrong in a stranger's config.
        raise D2QError(f"config.json: transformers can't make sense of text_config ({error})") from error
    complete.pop("transformers_version", None)
    tokens = {key: config[key] for key in config if key.endswith("_token_id") and isinstance(config[key], (int, list))}
    outer = {key: config[key] for key in ("_name_or_path", "quantization_config") if key in config}
    return {**complete, **tokens, **outer, "architectures": [architecture]}


def text_names(names: Iterable[str]) -> dict[str, str]:
    """Of the tensors that belong to the text part, their names in it, to those in the checkpoint."""
    found = {}
    for name in names:
        if name.startswith("language_model."):
            found[name.removeprefix("language_model.")] = name
        elif name.startswith("model.language_model."):
            found["model." + name.removeprefix("model.language_model.")] = name
        elif not name.startswith(_WITHOUT_TEXT):
            found[name] = name
    return found
