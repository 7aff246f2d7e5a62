"""Collect added tokens, special and others: those that are found in a text before it is tokenized."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import gguf

from d2q_edge.errors import D2QError
from d2q_edge.model.tokenizer.files import Files

_GAPS = {"lstrip": "special", "rstrip": "special", "single_word": "word"}


@dataclass(frozen=True)
class AddedToken:
    """One added token, with its text as in the vocabulary."""

    text: str
    id: int
    special: bool  # whether it is marked as special
    # Tags of export/tokenizer_check.py for what llama.cpp can't do: "special" if it absorbs white space beside it
    # (lstrip, rstrip), "word" if it is found between words only (single_word).
    gaps: frozenset[str] = frozenset()
    # Whether tokenizer_config.json or added_tokens.json has it; for SentencePiece, the converter reads only these.
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


def read_vocabulary(files: Files) -> tuple[dict[str, int], dict[str, AddedToken], frozenset[str]]:
    """Return tokenizer.json's vocabulary, the added tokens of all files by text, and the texts that are left out.

    Left out are added tokens for which the model has no row: padding from training, or Gemma's image tokens. The model
    in transformers fails on these; llama.cpp's converter leaves them out, too.

    Raises:
        D2QError: the files contradict each other, or an id isn't valid.
    """
    vocab: dict[str, int] = files.content["model"]["vocab"] if files.content else {}
    added: dict[str, AddedToken] = {}

    def add(token: AddedToken, source: str) -> None:
        text = token.text
        known = added[text].id if text in added else vocab.get(text, token.id)
        if known != token.id:
            raise D2QError(f"{files.json} gives token {text!r} the id {known}, but {source} gives it {token.id}")
        if type(token.id) is not int or token.id < 0:
            raise D2QError(f"{files.directory / source} gives token {text!r} the id {token.id!r}")
        added[text] = replace(token, listed=source != "added_tokens")

    for entry in files.content.get("added_tokens") or []:
        add(_token(entry, entry["id"]), "added_tokens")
    for text, token_id in files.added.items():
        old = added.get(text, AddedToken(text, token_id, special=False))
        add(replace(old, id=token_id), "added_tokens.json")
    for key, entry in (files.settings.get("added_tokens_decoder") or {}).items():
        add(_token(entry, int(key)), "tokenizer_config.json")
    left_out = frozenset(text for text, token in added.items() if token.id >= files.vocab_size)
    vocab = {text: token_id for text, token_id in vocab.items() if text not in left_out}
    return vocab, {text: token for text, token in added.items() if text not in left_out}, left_out


def _token(entry: dict[str, Any], token_id: int) -> AddedToken:
    gaps = frozenset(gap for flag, gap in _GAPS.items() if entry.get(flag))
    return AddedToken(entry["content"], token_id, bool(entry.get("special")), gaps)


def check_distinct(files: Files, tokens: Iterable[str]) -> None:
    """Raise D2QError for two ids with the same text, on which llama.cpp aborts the whole process."""
    owners: dict[str, int] = {}
    for token_id, text in enumerate(tokens):
        if (other := owners.setdefault(text, token_id)) != token_id:
            raise D2QError(
                f"the tokenizer in {files.directory} has the token {text!r} twice, with the ids {other} and "
                f"{token_id}, which llama.cpp can't load"
            )
