"""The tokenizer files of a model directory: which there are, and their content."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2q_edge.errors import D2QError
from d2q_edge.utils.json_files import read_json_object


@dataclass(frozen=True)
class Files:
    """What tokenizers are built from.

    Attributes:
        directory: the model's.
        content: of tokenizer.json; empty where there is none.
        settings: tokenizer_config.json's content; empty where there is none.
        added: added_tokens.json's content, {text: id}; empty where there is none.
        config: config.json's content.
        vocab_size: rows of the embedding matrix.
    """

    directory: Path
    content: dict[str, Any]
    settings: dict[str, Any]
    added: dict[str, Any]
    config: Mapping[str, Any]
    vocab_size: int

    @classmethod
    def open(cls, directory: Path, config: Mapping[str, Any], vocab_size: int) -> Files:
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

        def read(name: str) -> dict[str, Any]:
            return read_json_object(directory / name) if (directory / name).is_file() else {}

        return cls(
            directory,
            read("tokenizer.json"),
            read("tokenizer_config.json"),
            read("added_tokens.json"),
            config,
            vocab_size,
        )

    @property
    def json(self) -> Path:
        """Path of tokenizer.json, whether it exists or not."""
        return self.directory / "tokenizer.json"

    @property
    def sentencepiece(self) -> Path:
        """Path of tokenizer.model, whether it exists or not."""
        return self.directory / "tokenizer.model"
