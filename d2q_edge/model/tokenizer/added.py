"""Added tokens: those that are found in a text before it is tokenized, special ones and others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import gguf

from d2q_edge.errors import D2QError
from d2q_edge.model.tokenizer.files import Files


@dataclass(frozen=True)
class AddedToken:
    """One of them.

    Attributes:
        text: as the vocabulary has it.
        id: its id.
        special: marked as such.
        strips: whether it takes white space beside it away, which llama.cpp's tokens don't.
        listed: whether tokenizer_config.json or added_tokens.json has it, which is all that llama.cpp's converter
            reads for SentencePiece.
    """

    text: str
    id: int
    special: bool
    strips: bool = False
    listed: bool = False

    @property
    def type(self) -> int:
        """CONTROL or USER_DEFINED."""
        control = self.special or _looks_special(self.text)
        return int(gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED)

    @property
    def gguf_text(self) -> str:
        """The text that llama.cpp looks for; spaces in tokens of users are spelled as such."""
        return self.text if self.type == gguf.TokenType.CONTROL else self.text.replace("\u2581", " ")


def added_tokens(files: Files, vocab: dict[str, int]) -> dict[str, AddedToken]:
    """By text: tokenizer.json's, then those that only the other files have.

    Raises:
        D2QError: the files contradict each other, or an id isn't one.
    """
    added: dict[str, AddedToken] = {}

    def add(token: AddedToken, source: str) -> None:
        known = added[token.text].id if token.text in added else vocab.get(token.text, token.id)
        if known != token.id:
            raise D2QError(f"{files.json} gives token {token.text!r} the id {known}, but {source} gives it {token.id}")
        if type(token.id) is not int or token.id < 0:
            raise D2QError(f"{files.directory / source} gives token {token.text!r} the id {token.id!r}")
        added[token.text] = token

    for entry in files.content.get("added_tokens") or []:
        strips = bool(entry.get("lstrip") or entry.get("rstrip"))
        add(AddedToken(entry["content"], entry["id"], bool(entry.get("special")), strips), "added_tokens")
    for text, token_id in files.added.items():
        old = added.get(text)
        special, strips = (old.special, old.strips) if old else (False, False)
        add(AddedToken(text, token_id, special, strips, listed=True), "added_tokens.json")
    for key, entry in (files.settings.get("added_tokens_decoder") or {}).items():
        strips = bool(entry.get("lstrip") or entry.get("rstrip"))
        token = AddedToken(entry["content"], int(key), bool(entry.get("special")), strips, listed=True)
        add(token, "tokenizer_config.json")
    return added


def split_off(added: dict[str, AddedToken], size: int) -> tuple[dict[str, AddedToken], frozenset[str]]:
    """Added tokens that the model has a row for, and the texts of the others: padding of training, Gemma's images.

    A model that is given one of those fails, in transformers; llama.cpp's converter leaves them out, too.
    """
    within = {text: token for text, token in added.items() if token.id < size}
    return within, frozenset(added.keys() - within.keys())


def check_distinct(files: Files, tokens: Iterable[str]) -> None:
    """Refuse two ids of the same text, for which llama.cpp stops the whole process.

    Raises:
        D2QError: there are such.
    """
    owners: dict[str, int] = {}
    for token_id, text in enumerate(tokens):
        if (other := owners.setdefault(text, token_id)) != token_id:
            raise D2QError(
                f"the tokenizer in {files.directory} has the token {text!r} twice, with the ids {other} and "
                f"{token_id}, which llama.cpp can't load"
            )


def _looks_special(text: str) -> bool:
    """Whether a token is meant for control although nobody marked it (the list is llama.cpp's)."""
    bracketed = (text.startswith("<|") and text.endswith("|>")) or (text.startswith("<｜") and text.endswith("｜>"))
    return bracketed or text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or text.startswith("<unused")
