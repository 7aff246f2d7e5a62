"""Read a model's chat template, one text or several named ones; it is copied, never run."""

from pathlib import Path
from typing import Any

from d2q_edge.errors import D2QError
from d2q_edge.utils.json_files import read_json_object


def read_chat_template(directory: Path, settings: dict[str, Any]) -> str | list[dict[str, str]] | None:
    """Return the chat template of chat_template.jinja, else of tokenizer_config.json, else of chat_template.json.

    This is transformers' order; llama.cpp's converter looks into tokenizer_config.json first.

    Args:
        directory: the model's.
        settings: the content of tokenizer_config.json.

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
    template, file = settings.get("chat_template"), directory / "tokenizer_config.json"
    if template is None and (directory / "chat_template.json").is_file():
        file = directory / "chat_template.json"
        template = read_json_object(file).get("chat_template")
    if template is None or isinstance(template, str):
        return template
    if isinstance(template, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
        for entry in template
    ):
        return template
    raise D2QError(f"{file}: chat_template must be a text, or a list of objects with a name and a template")
