"""The general.* metadata of a file: what a model's card, configs and directory say about it, made fit to be written.

gguf-py gathers it, by the rules of llama.cpp's converter. But a card is free text by strangers: a version may be a
number, an author a list, "no" a truth value. None of that is a reason not to convert a model: values are turned into
what their keys hold, or left out. Does not know the model's own settings (families/) or its tokenizer.
"""

import dataclasses
import datetime
import json
import logging
import math
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf

from d2q_edge.errors import D2QError
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.hub import Repository, repository
from d2q_edge.utils.json_files import read_json_object

_INT32 = range(-(2**31), 2**31)
_YAML_WORDS = {True: "yes", False: "no"}
"""What YAML takes for truth values: "no" is Norwegian."""


def general_metadata(
    checkpoint: Checkpoint, parameters: tuple[int, int, int, int], *, quantized: bool
) -> tuple[gguf.Metadata, list[str]]:
    """Gather the metadata.

    Args:
        checkpoint: the model.
        parameters: see Family.parameters.
        quantized: whether the file is a quantized version, whose base model is this one.

    Returns:
        The metadata, which has a name and a size label, and sentences about what was left out.
    """
    directory = checkpoint.directory.resolve()
    notes: list[str] = []
    # It would say in its own way what is said here, every time.
    logging.getLogger("metadata").setLevel(logging.CRITICAL)
    try:
        metadata = _load(directory, parameters[0], quantized=quantized)
    except Exception as error:
        # Free text, parsed as YAML; there is no one exception for what can be wrong.
        reason = " ".join(str(error).split())
        notes.append(
            f"README.md (the model card), generation_config.json or the name in config.json of {directory} can't be "
            f"read ({reason}); the file goes without what they say"
        )
        metadata = _load_without_card(checkpoint, directory, parameters[0])
    for field in dataclasses.fields(metadata):
        value = getattr(metadata, field.name)
        fit = None if value is None else _fit(value, str(field.type))
        if fit is None and value is not None:
            notes.append(f"the file goes without the model's {field.name}, which isn't what it should be: {value!r}")
        setattr(metadata, field.name, fit)
    if metadata.name is None:
        metadata.name = directory.name
    if metadata.size_label is None:
        metadata.size_label = gguf.size_label(*parameters)
    return metadata, notes


def _load(directory: Path, parameters: int, *, quantized: bool) -> gguf.Metadata:
    """What gguf-py's converter gathers."""
    metadata = gguf.Metadata.load(model_path=directory, total_params=parameters)
    # The version of gguf-py on PyPI lacks this rule of the converter in our llama.cpp.
    generation = gguf.Metadata.load_generation_config(directory)
    if metadata.sampling_penalty_repeat is None and isinstance(generation, dict):
        metadata.sampling_penalty_repeat = generation.get("repetition_penalty")
    if (source := repository(directory)) is not None:
        _name_after(metadata, source, directory, parameters, quantized=quantized)
    return metadata


def _load_without_card(checkpoint: Checkpoint, directory: Path, parameters: int) -> gguf.Metadata:
    """The same of a directory of the same name with nothing but what can be read."""
    name = checkpoint.config.get("_name_or_path")
    files = {"config.json": {"_name_or_path": name} if isinstance(name, str) else {}}
    if (directory / "generation_config.json").is_file():
        # One that can't be read may have been the reason.
        with suppress(D2QError):
            files["generation_config.json"] = read_json_object(directory / "generation_config.json")
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / (directory.name or "model")
        copy.mkdir()
        for file, content in files.items():
            (copy / file).write_text(json.dumps(content), "utf-8")
        return _load(copy, parameters, quantized=False)


def _name_after(
    metadata: gguf.Metadata, source: Repository, directory: Path, parameters: int, *, quantized: bool
) -> None:
    """Put a repository's id in the place of its directory's name, which is a commit in the hub's cache.

    A quantized file's base model is the repository, whatever that one's own base is; so the hub shows it.
    """
    card = gguf.Metadata.load_model_card(directory)
    if quantized:
        card = {**card, "base_model": source.id}
    known = gguf.Metadata.apply_metadata_heuristic(
        gguf.Metadata(), card, {"_name_or_path": source.id}, total_params=parameters
    )
    for field in ("name", "organization", "basename", "finetune", "version", "size_label", "base_models"):
        setattr(metadata, field, getattr(known, field))
    metadata.source_repo_url = metadata.source_repo_url or source.url


def _fit(value: Any, kind: str) -> Any:
    """A value as a field of gguf.Metadata of that declared type holds it; None if it can't be."""
    if "dict" in kind:
        # Empty entries stay: gguf-py counts them, and its converter makes some.
        entries = value if isinstance(value, list) else []
        return [
            {str(key): text for key, item in entry.items() if (text := _text(item)) is not None}
            for entry in entries
            if isinstance(entry, dict)
        ]
    if "list" in kind:
        texts = [_text(item) for item in value] if isinstance(value, list) else [_text(value)]
        return [text for text in texts if text is not None]
    if "str" in kind:
        return _text(value)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if "int" in kind:
        return int(value) if number and value == int(value) and int(value) in _INT32 else None
    return value if number else None


def _text(value: Any) -> str | None:
    """A scalar, or a list of them with commas between, as text."""
    if isinstance(value, bool):
        return _YAML_WORDS[value]
    if isinstance(value, list):
        texts = [text for item in value if not isinstance(item, list) and (text := _text(item)) is not None]
        return ",".join(texts) if texts else None
    return str(value) if isinstance(value, (str, int, float, datetime.date)) else None
