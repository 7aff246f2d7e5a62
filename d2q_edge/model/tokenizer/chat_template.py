"""A model's chat template: one text, or several with names. It is copied, never run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from d2q_edge.errors import D2QError
from d2q_edge.utils.json_files import read_json_object


def read_chat_template(directory: Path, settings: dict[str, Any]) -> str | list[dict[str, str]] | None:
    """The chat template: chat_template.jinja's, else tokenizer_config.json's, else chat_template.json's.

    In this order transformers has them; llama.cpp's converter looks into tokenizer_config.json first.

    Raises:
        D2QError: it has another form, or can't be read.
    """
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        try:
            default = jinja.read_text(encoding="utf-8")
            more = sorted((directory / "additional_chat_templates").glob("*.jinja"))
            if not more:
                return default
            named = [{"name": file.stem, "template": file.read_text(encoding="utf-8")} for file in more]
            return [{"name": "default", "template": default}, *named]
        except (OSError, UnicodeDecodeError) as error:
            raise D2QError(f"can't read the chat template in {directory}: {error}") from error
    template = settings.get("chat_template")
    if template is not None:
        return _checked(template, directory / "tokenizer_config.json")
    file = directory / "chat_template.json"
    if file.is_file():
        template = read_json_object(file).get("chat_template")
        return None if template is None else _checked(template, file)
    return None


def _checked(template: Any, file: Path) -> str | list[dict[str, str]]:
    if isinstance(template, str):
        return template
    if isinstance(template, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
        for entry in template
    ):
        return template
    raise D2QError(f"{file}: chat_template must be a text, or a list of objects with a name and a template")
