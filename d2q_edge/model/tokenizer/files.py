"""Read the tokenizer files of a model directory."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2q_edge.errors import D2QError
from d2q_edge.utils.json_files import read_json_object


@dataclass(frozen=True)
class Files:
    """The content of the files that a tokenizer is built from; empty where a file doesn't exist.

    Attributes:
        directory: the model's.
        content: tokenizer.json.
        settings: tokenizer_config.json.
        added: added_tokens.json, {text: id}.
        config: config.json.
        vocab_size: rows of the embedding matrix.
    """

    directory: Path
    content: dict[str, Any]
    settings: dict[str, Any]
    added: dict[str, Any]
    config: Mapping[str, Any]
    vocab_size: int

    @classmethod
    def open(cls, directory: Path, config: Mapping[str, Any], vocab_size: int) -> "Files":
        """Read the JSON files.

        Raises:
            D2QError: there is neither tokenizer.json nor tokenizer.model, or a file can't be read.
        """
        if not ((directory / "tokenizer.json").is_file() or (directory / "tokenizer.model").is_file()):
            if (directory / "tekken.json").is_file():
                raise D2QError(
                    f"{directory} has its tokenizer in Mistral's tekken.json only; add the tokenizer.json of the same "
                    "model in Hugging Face's format"
                )
            raise D2QError(f"{directory} has no tokenizer.json or tokenizer.model; download the tokenizer files too")
        content, settings, added = (
            read_json_object(directory / name) if (directory / name).is_file() else {}
            for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")
        )
        return cls(directory, content, settings, added, config, vocab_size)

    @property
    def json(self) -> Path:
        """Return the path of tokenizer.json, whether it exists or not."""
        return self.directory / "tokenizer.json"

    @property
    def sentencepiece(self) -> Path:
        """Return the path of tokenizer.model, whether it exists or not."""
        return self.directory / "tokenizer.model"

    def check_id(self, text: str, token_id: Any) -> None:
        """Require that a token of tokenizer.json has a row in the model.

        Raises:
            D2QError: the id isn't one of the model's.
        """
        if type(token_id) is not int or not 0 <= token_id < self.vocab_size:
            raise D2QError(
                f"{self.json} gives token {text!r} the id {token_id!r}, but the model has {self.vocab_size} tokens only"
            )
