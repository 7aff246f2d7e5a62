"""What a GGUF says about a tokenizer, and in which order it says it (llama.cpp's converter's)."""

from __future__ import annotations

from dataclasses import dataclass

import gguf

from d2q_edge.model.tokenizer.pre_tokenizers import BY_NAME

GRANITE_VOCAB_SIZE = 49152
"""llama.cpp's converter takes every "llama" vocabulary of this size for Granite's, and says that it has no BOS."""


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer ready to be written. `types` are gguf.TokenType values; `tokens` has one entry per model row."""

    model: str
    """"gpt2" for byte-level BPE, "llama" for SentencePiece's BPE."""
    pre: str
    """llama.cpp's name for the way text is split before merging."""
    tokens: list[str]
    types: list[int]
    merges: list[str]
    """Empty for SentencePiece, which merges by score."""
    scores: list[float] | None
    """One per token; None for byte-level BPE."""
    special_ids: dict[str, int]
    """Role ("bos", "eos", "pad", ...) to token id."""
    add_special: dict[str, bool]
    """Role to whether tokenizing a text adds that token."""
    chat_template: str | list[dict[str, str]] | None
    space_prefix_setting: bool | None
    """tokenizer_config.json's add_prefix_space, which some architectures record."""
    adds_space_prefix: bool
    """Whether a text's first word is tokenized as if a space came before it."""
    gaps: frozenset[str] = frozenset()
    """Kinds of text (tags of verify's probes) that llama.cpp is known to tokenize in another way."""
    left_out: frozenset[str] = frozenset()
    """Added tokens that the model has no row for."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on what one wouldn't expect."""
        if not self.left_out:
            return ()
        first, count = min(self.left_out), len(self.left_out)
        what = f"the token {first!r} is" if count == 1 else f"{first!r} and {count - 1} more tokens are"
        return (f"{what} left out: the tokenizer has more than the model's {len(self.tokens)}",)

    @property
    def adds_bos(self) -> bool:
        """Whether llama.cpp puts the BOS token before a text: what the file says, else its own default."""
        return self.add_special.get("bos", self.model == "llama" or BY_NAME[self.pre].adds_bos)

    @property
    def bos(self) -> int | None:
        """The token that llama.cpp puts before a text, if it does."""
        default = 1 if self.model == "llama" else None
        return self.special_ids.get("bos", default) if self.adds_bos else None

    def add_to(self, writer: gguf.GGUFWriter, *, space_prefix: bool = False) -> None:
        """Add the `tokenizer.*` keys.

        Args:
            writer: gguf-py's.
            space_prefix: whether the architecture is one of those whose add_space_prefix is tokenizer_config.json's,
                llama.cpp's "llama" and what derives from it. Others have it only where llama.cpp's default is wrong.
        """
        said = None
        if space_prefix and self.space_prefix_setting is not None:
            said = self.space_prefix_setting
            writer.add_add_space_prefix(said)
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        # Not every role has a key.
        for role, token_id in self.special_ids.items():
            if hasattr(writer, f"add_{role}_token_id"):
                getattr(writer, f"add_{role}_token_id")(token_id)
        for role, value in self.add_special.items():
            if hasattr(writer, f"add_add_{role}_token"):
                getattr(writer, f"add_add_{role}_token")(value)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)
        if space_prefix and len(self.tokens) == GRANITE_VOCAB_SIZE and "bos" not in self.add_special:
            writer.add_add_bos_token(False)
        if self.model == "llama" and said is None and not self.adds_space_prefix:
            writer.add_add_space_prefix(False)
