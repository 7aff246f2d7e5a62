"""Refuse symbolic links out of a model's or an adapter's directory.

The directory is untrusted input, and what such a link points to would end up in a file that is meant to be published.
"""

from pathlib import Path

from d2q_edge.errors import D2QError
from d2q_edge.model.hub import blob_directories

READ_SUFFIXES = (".json", ".safetensors", ".model", ".jinja", ".txt", ".md")
"""The kinds of files that are read from a model's directory: weights, configs, the tokenizer's, the model card."""


def check_links(directory: Path) -> None:
    """Refuse symbolic links out of the directory; those in the hub's cache must lead to the cache's own blobs."""
    allowed = (directory.resolve(), *blob_directories(directory))
    for file in sorted([*directory.iterdir(), *(directory / "additional_chat_templates").glob("*")]):
        target = file.resolve()
        if file.suffix in READ_SUFFIXES and not any(target.is_relative_to(place) for place in allowed):
            raise D2QError(
                f"{file} is a symbolic link to {target}, outside of its directory; copy the file there if you trust it"
            )
