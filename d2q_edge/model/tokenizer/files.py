"""Read the tokenizer files of a model directory."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from d2q_edge.errors import D2QError
from d2q_edge.utils.json_files import read_json_object


class Files:
    """The content of the files that a tokenizer is built from.

    `content` is tokenizer.json's, or what transformers makes of vocab.json and merges.txt; `settings` is
    tokenizer_config.json's, `added` added_tokens.json's ({text: id}), `generation` generation_config.json's; each is
    empty where there is no such file. `json` and `sentencepiece` are the paths of tokenizer.json (or vocab.json) and
    tokenizer.model, `config` is config.json's content, and `vocab_size` the number of rows of the embedding matrix.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any], vocab_size: int) -> None:
        """Read the JSON files.

        Raises:
            D2QError: there is no tokenizer, or a file can't be read; a damaged generation_config.json is ignored.
        """
        self.directory, self.config, self.vocab_size = directory, config, vocab_size
        self.json, self.sentencepiece = directory / "tokenizer.json", directory / "tokenizer.model"
        parts = directory / "vocab.json", directory / "merges.txt"
        in_parts = not (self.json.is_file() or self.sentencepiece.is_file())
        if in_parts and not all(part.is_file() for part in parts):
            if (directory / "tekken.json").is_file():
                raise D2QError(
                    f"{directory} has its tokenizer in Mistral's tekken.json only; add the tokenizer.json of the same "
                    "model in Hugging Face's format"
                )
            raise D2QError(
                f"{directory} has no tokenizer.json or tokenizer.model, nor a vocab.json with merges.txt; download the "
                "tokenizer files too"
            )
        names = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")
        self.content, self.settings, self.added = (
            read_json_object(directory / name) if (directory / name).is_file() else {} for name in names
        )
        if in_parts:
            from d2q_edge.model.tokenizer.original import assemble

            self.json, self.content = parts[0], assemble(directory)
        self.generation: dict[str, Any] = {}
        with suppress(D2QError):  # if it is damaged, export/metadata.py says so
            self.generation = read_json_object(directory / "generation_config.json")

    @property
    def space_prefix_setting(self) -> bool | None:
        """Return tokenizer_config.json's add_prefix_space, if it is true or false."""
        setting = self.settings.get("add_prefix_space")
        return setting if isinstance(setting, bool) else None

    def check_id(self, text: str, token_id: Any) -> None:
        """Require that a token of tokenizer.json has a row in the model; raise D2QError if not."""
        if type(token_id) is not int or not 0 <= token_id < self.vocab_size:
            raise D2QError(
                f"{self.json} gives token {text!r} the id {token_id!r}, but the model has {self.vocab_size} tokens only"
            )

    def chat_template(self) -> str | list[dict[str, str]] | None:
        """Return the chat template of chat_template.jinja, else of tokenizer_config.json, else of chat_template.json.

        This is transformers' order; llama.cpp's converter looks into tokenizer_config.json first.

        Raises:
            D2QError: it is neither one text nor several named ones, or can't be read.
        """
        jinja = self.directory / "chat_template.jinja"
        if jinja.is_file():
            try:
                default = jinja.read_text(encoding="utf-8")
                more = sorted((self.directory / "additional_chat_templates").glob("*.jinja"))
                named = [{"name": file.stem, "template": file.read_text(encoding="utf-8")} for file in more]
                return [{"name": "default", "template": default}, *named] if named else default
            except (OSError, UnicodeDecodeError) as error:
                raise D2QError(f"can't read the chat template in {self.directory}: {error}") from error
        template, file = self.settings.get("chat_template"), self.directory / "tokenizer_config.json"
        if template is None and (self.directory / "chat_template.json").is_file():
            file = self.directory / "chat_template.json"
            template = read_json_object(file).get("chat_template")
        if template is None or isinstance(template, str):
            return template
        if isinstance(template, list) and all(
            isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
            for entry in template
        ):
            return template
        raise D2QError(f"{file}: chat_template must be a text, or a list of objects with a name and a template")
