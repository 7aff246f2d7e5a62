"""Collect a file's general.* metadata from the model card, the configs and the directory name, and make it writable.
That of a GGUF file is taken over.

gguf-py collects it by the rules of llama.cpp's converter. But a card is untrusted free text (a version may be a number,
an author a list, "no" a boolean): values are converted to what their keys hold, or left out.
"""

import dataclasses
import datetime
import json
import logging
import math
import re
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf

from d2q_edge.errors import D2QError
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.hub import repository
from d2q_edge.utils.json_files import read_json_object

_INT32 = range(-(2**31), 2**31)
_YAML_WORDS = {True: "yes", False: "no"}
"""What YAML takes for booleans: "no" is Norwegian."""


def general_metadata(
    checkpoint: Checkpoint, parameters: tuple[int, int, int, int], *, quantized: bool
) -> tuple[gguf.Metadata, list[str]]:
    """Return the metadata, which has a name and a size label, and sentences about what was left out.

    `parameters` are those of Family.parameters; a `quantized` file has the checkpoint as its base model.
    """
    directory = checkpoint.directory.resolve()
    notes: list[str] = []
    logging.getLogger("metadata").setLevel(logging.CRITICAL)  # gguf-py's own messages about what the notes say
    try:
        metadata = (
            _load_from_file(checkpoint.gguf)
            if checkpoint.gguf
            else _load(directory, parameters[0], quantized=quantized)
        )
    except Exception as error:  # whatever parsing free text as YAML raises
        notes.append(
            f"README.md (the model card), generation_config.json or the name in config.json of {directory} can't be "
            f"read ({' '.join(str(error).split())}); the file goes without what they say"
        )
        metadata = _load_without_card(checkpoint, directory, parameters[0])
    for field in dataclasses.fields(metadata):
        value = getattr(metadata, field.name)
        converted = None if value is None else _convert(value, str(field.type))
        if converted is None and value is not None:
            notes.append(f"the file goes without the model's {field.name}, which isn't what it should be: {value!r}")
        setattr(metadata, field.name, converted)
    name = directory.stem if checkpoint.gguf else directory.name
    metadata.name = name if metadata.name is None else metadata.name
    metadata.size_label = gguf.size_label(*parameters) if metadata.size_label is None else metadata.size_label
    return metadata, notes


def _load(directory: Path, parameters: int, *, quantized: bool) -> gguf.Metadata:
    """Return what llama.cpp's converter collects."""
    metadata = gguf.Metadata.load(model_path=directory, total_params=parameters)
    # The version of gguf-py on PyPI lacks this rule of the converter in our llama.cpp.
    generation = gguf.Metadata.load_generation_config(directory)
    if metadata.sampling_penalty_repeat is None and isinstance(generation, dict):
        metadata.sampling_penalty_repeat = generation.get("repetition_penalty")
    if (source := repository(directory)) is not None:
        _name_after(metadata, source, directory, parameters, quantized=quantized)
    return metadata


def _load_from_file(file: GGUFFile) -> gguf.Metadata:
    """Return the general.* keys of a GGUF file, without who quantized it."""
    metadata = gguf.Metadata()
    for field in dataclasses.fields(metadata):
        setattr(metadata, field.name, file.kv.get(getattr(gguf.Keys.General, field.name.upper(), "")))
    metadata.quantized_by = None
    for kind in ("base_model", "dataset"):
        found: dict[str, dict[str, Any]] = {}
        for key, value in file.kv.items():
            if match := re.fullmatch(rf"general\.{kind}\.(\d+)\.(\w+)", key, re.ASCII):
                found.setdefault(match[1], {})[match[2]] = value
        setattr(metadata, f"{kind}s", [found[number] for number in sorted(found, key=int)] or None)
    return metadata


def _load_without_card(checkpoint: Checkpoint, directory: Path, parameters: int) -> gguf.Metadata:
    """Return the same for a directory of the same name that holds only the files that can be read."""
    name = checkpoint.config.get("_name_or_path")
    files = {"config.json": {"_name_or_path": name} if isinstance(name, str) else {}}
    if (directory / "generation_config.json").is_file():
        with suppress(D2QError):  # it may have been the reason
            files["generation_config.json"] = read_json_object(directory / "generation_config.json")
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / (directory.name or "model")
        copy.mkdir()
        for file, content in files.items():
            (copy / file).write_text(json.dumps(content), "utf-8")
        return _load(copy, parameters, quantized=False)


def _name_after(metadata: gguf.Metadata, source: str, directory: Path, parameters: int, *, quantized: bool) -> None:
    """Take names from a repository's id in place of the directory's name, which is a commit in the hub's cache.

    A quantized file's base model is the repository, whatever that one's own base is; this is how the hub shows it.
    """
    card = gguf.Metadata.load_model_card(directory)
    if quantized:
        card = {**card, "base_model": source}
    config = {"_name_or_path": source}
    known = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), card, config, total_params=parameters)
    for field in ("name", "organization", "basename", "finetune", "version", "size_label", "base_models"):
        setattr(metadata, field, getattr(known, field))
    metadata.source_repo_url = metadata.source_repo_url or f"https://huggingface.co/{source}"


def _convert(value: Any, kind: str) -> Any:
    """Convert a value to a gguf.Metadata field's declared type `kind`; None if it can't be."""
    if "dict" in kind:
        # Empty entries stay: gguf-py counts them, and its converter makes some.
        entries = [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
        pairs = [[(str(key), _text(item)) for key, item in entry.items()] for entry in entries]
        return [{key: text for key, text in entry if text is not None} for entry in pairs]
    if "list" in kind:
        texts = [_text(item) for item in (value if isinstance(value, list) else [value])]
        return [text for text in texts if text is not None]
    if "str" in kind:
        return _text(value)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not -math.inf < value < math.inf:
        return None
    if "int" in kind:
        return int(value) if value == int(value) and int(value) in _INT32 else None
    return value


def _text(value: Any) -> str | None:
    """Return a scalar, or a list of them joined by commas, as text."""
    if isinstance(value, bool):
        return _YAML_WORDS[value]
    if isinstance(value, list):
        texts = [text for item in value if not isinstance(item, list) and (text := _text(item)) is not None]
        return ",".join(texts) if texts else None
    return str(value) if isinstance(value, (str, int, float, datetime.date)) else None
