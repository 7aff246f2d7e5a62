"""Extract the text model of a multimodal checkpoint: Gemma 3 from 4B on, Gemma 4, Ministral 3, Qwen3.5.

Such a checkpoint nests the text model's settings in config.json's `text_config`, which omits what is transformers'
default, and prefixes its tensor names: `language_model.` in published files, `model.language_model.` in files that
transformers 5 saves. llama.cpp's converter also skips the vision tower. Qwen3.5's layers that predict further tokens
(mtp) are left out, too.
"""

import re
from collections.abc import Iterable
from typing import Any

from d2q_edge.errors import D2QError
from d2q_edge.model.families.base import MAX_LAYERS

TEXT_MODELS = {
    "Gemma3ForConditionalGeneration": ("Gemma3ForCausalLM", "gemma3_text"),
    "Gemma4ForConditionalGeneration": ("Gemma4ForCausalLM", "gemma4_text"),
    "Mistral3ForConditionalGeneration": ("Ministral3ForCausalLM", "ministral3"),
    "Qwen3_5ForConditionalGeneration": ("Qwen3_5ForCausalLM", "qwen3_5_text"),
}
"""Multimodal architecture to the architecture and model_type of its text model."""
_PARTS = ("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio.", "multi_modal_projector.", "visual.", "mtp.")
_OTHER_PARTS = (*_PARTS, *(f"model.{part}" for part in _PARTS))


def is_multimodal(config: dict[str, Any]) -> bool:
    """Return whether config.json describes a multimodal checkpoint whose text model can be converted."""
    architectures = config.get("architectures")
    return isinstance(architectures, list) and any(architectures[:1] == [name] for name in TEXT_MODELS)


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config.json of the text model alone; raise D2QError if text_config is missing or invalid."""
    from transformers import AutoConfig

    architecture, model_type = TEXT_MODELS[config["architectures"][0]]
    settings = config.get("text_config")
    if not isinstance(settings, dict):
        raise D2QError("config.json has no text_config, which describes the part of the model that is for text")
    if settings.get("model_type", model_type) != model_type:
        raise D2QError(
            f"config.json: the text model is of the type {settings['model_type']!r:.40}, but only {model_type} is "
            f"supported in {config['architectures'][0]}"
        )
    if (layers := settings.get("num_hidden_layers")) is not None and (type(layers) is not int or layers > MAX_LAYERS):
        # transformers would build a list of that many layer types.
        raise D2QError(f"config.json: text_config's num_hidden_layers makes no sense: {layers!r:.40}")
    try:
        complete = AutoConfig.for_model(**{**settings, "model_type": model_type}).to_dict()
    except Exception as error:
        # transformers raises all kinds of exceptions for an invalid config.
        raise D2QError(f"config.json: transformers can't make sense of text_config ({error})") from error
    complete.pop("transformers_version", None)
    if isinstance(tied := config.get("tie_word_embeddings"), bool) and "tie_word_embeddings" not in settings:
        complete["tie_word_embeddings"] = tied
    tokens = {key: config[key] for key in config if key.endswith("_token_id") and isinstance(config[key], (int, list))}
    outer = {key: config[key] for key in ("_name_or_path", "quantization_config") if key in config}
    return {**complete, **tokens, **outer, "architectures": [architecture]}


def text_names(names: Iterable[str]) -> dict[str, str]:
    """Map the text model's tensor names to the names that they have in the multimodal checkpoint."""
    kept = (name for name in names if not name.startswith(_OTHER_PARTS))
    return {re.sub(r"^(model\.)?language_model\.", r"\1", name): name for name in kept}
