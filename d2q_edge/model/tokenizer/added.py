"""Collect added tokens, special and others: those that are found in a text before it is tokenized."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import gguf

from d2q_edge.errors import D2QError
from d2q_edge.model.tokenizer.files import Files


@dataclass(frozen=True)
class AddedToken:
    """One added token.

    Attributes:
        text: as the vocabulary has it.
        id: its id.
        special: whether it is marked as special.
        strips: whether it absorbs white space beside it, which llama.cpp can't do.
        listed: whether tokenizer_config.json or added_tokens.json has it; llama.cpp's converter reads only these for
            SentencePiece.
    """

    text: str
    id: int
    special: bool
    strips: bool = False
    listed: bool = False

    @property
    def type(self) -> int:
        """Return CONTROL or USER_DEFINED; the texts that are control tokens without being marked are llama.cpp's."""
        text = self.text
        bracketed = (text.startswith("<|") and text.endswith("|>")) or (text.startswith("<｜") and text.endswith("｜>"))
        unmarked = bracketed or text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or text.startswith("<unused")
        return int(gguf.TokenType.CONTROL if self.special or unmarked else gguf.TokenType.USER_DEFINED)

    @property
    def gguf_text(self) -> str:
        """Return the text that llama.cpp looks for; user-defined tokens have plain spaces."""
        return self.text if self.type == gguf.TokenType.CONTROL else self.text.replace("\u2581", " ")


def added_tokens(files: Files, vocab: dict[str, int]) -> dict[str, AddedToken]:
    """Return the added tokens by text: tokenizer.json's, then those that only the other files have.

    Raises:
        D2QError: the files contradict each other, or an id isn't valid.
    """
    added: dict[str, AddedToken] = {}

    def add(token: AddedToken, source: str) -> None:
        known = added[token.text].id if token.text in added else vocab.get(token.text, token.id)
        if known != token.id:
            raise D2QError(f"{files.json} gives token {token.text!r} the id {known}, but {source} gives it {token.id}")
        if type(token.id) is not int or token.id < 0:
            raise D2QError(f"{files.directory / source} gives token {token.text!r} the id {token.id!r}")
        added[token.text] = token

    def parse(entry: dict[str, Any], token_id: Any, *, listed: bool) -> AddedToken:
        strips = bool(entry.get("lstrip") or entry.get("rstrip"))
        return AddedToken(entry["content"], token_id, bool(entry.get("special")), strips, listed)

    for entry in files.content.get("added_tokens") or []:
        add(parse(entry, entry["id"], listed=False), "added_tokens")
    for text, token_id in files.added.items():
        old = added.get(text)
        special, strips = (old.special, old.strips) if old else (False, False)
        add(AddedToken(text, token_id, special, strips, listed=True), "added_tokens.json")
    for key, entry in (files.settings.get("added_tokens_decoder") or {}).items():
        add(parse(entry, int(key), listed=True), "tokenizer_config.json")
    return added


def split_off(added: dict[str, AddedToken], size: int) -> tuple[dict[str, AddedToken], frozenset[str]]:
    """Split off the added tokens for which the model has no row: padding from training, or Gemma's image tokens.

    The model in transformers fails on these; llama.cpp's converter leaves them out, too.

    Returns:
        The tokens with a row, and the texts of the others.
    """
    within = {text: token for text, token in added.items() if token.id < size}
    return within, frozenset(added.keys() - within.keys())


def check_distinct(files: Files, tokens: Iterable[str]) -> None:
    """Refuse two ids with the same text, because llama.cpp aborts the whole process.

    Raises:
        D2QError: there are such ids.
    """
    owners: dict[str, int] = {}
    for token_id, text in enumerate(tokens):
        if (other := owners.setdefault(text, token_id)) != token_id:
            raise D2QError(
                f"the tokenizer in {files.directory} has the token {text!r} twice, with the ids {other} and "
                f"{token_id}, which llama.cpp can't load"
            )
