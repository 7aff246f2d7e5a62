"""Write a tokenizer's GGUF keys, in the order of llama.cpp's converter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import gguf

from d2q_edge.model.tokenizer.pre_tokenizers import BY_NAME

GRANITE_VOCAB_SIZE = 49152
"""llama.cpp's converter takes every "llama" vocabulary of this size for Granite's and records that it has no BOS."""


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer ready to be written."""

    model: str  # "gpt2" for byte-level BPE, "llama" for SentencePiece's BPE, "gemma4" for Gemma 4's
    pre: str  # llama.cpp's name of the pre-tokenizer
    tokens: list[str]  # one per row of the embedding matrix
    types: list[int]  # gguf.TokenType values
    merges: list[str]  # in order; empty for SentencePiece, which merges by score
    special_ids: dict[str, int]  # by role: "bos", "eos", "pad", ...
    add_special: dict[str, bool]  # by role: whether that token is added to every text
    chat_template: str | list[dict[str, str]] | None  # one text, or several as [{"name": ..., "template": ...}]
    space_prefix_setting: bool | None  # tokenizer_config.json's add_prefix_space, which some architectures record
    scores: list[float] | None = None  # one per token; None for byte-level BPE
    adds_space_prefix: bool = False  # whether text is tokenized as if a space came before it
    gaps: frozenset[str] = frozenset()  # tags of export/tokenizer_check.py: text that llama.cpp tokenizes differently
    left_out: frozenset[str] = frozenset()  # added tokens for which the model has no row
    beside: tuple[str, ...] = ()  # added tokens for which it matters to the original, what stands beside them
    lost_ends: tuple[str, ...] = ()  # tokens that end generation in the original, but not in llama.cpp
    # The keys of a GGUF file, as GGUFFile.packed has them, that are written in place of all this.
    packed: Mapping[str, tuple[int, memoryview]] = field(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        """Return sentences on what the user wouldn't expect."""
        notes = []
        if self.left_out:
            first, count = min(self.left_out), len(self.left_out)
            what = f"the token {first!r} is" if count == 1 else f"{first!r} and {count - 1} more tokens are"
            notes.append(f"{what} left out: the tokenizer has more than the model's {len(self.tokens)}")
        if self.beside:
            notes.append(
                f"{_names(self.beside)}: the original tokenizer takes white space beside such tokens in, or finds them "
                "between words only (lstrip, rstrip, single_word), but llama.cpp may not; text beside them can differ"
            )
        if self.lost_ends:
            notes.append(
                f"{_names(self.lost_ends)} end the original's answers, but a GGUF file has no more keys for it"
            )
        if (template := self.default_template) is not None:
            notes.append(f"none of the chat templates is the default one; the file has {template['name']!r} as such")
        return tuple(notes)

    @property
    def default_template(self) -> dict[str, str] | None:
        """Return the chat template that becomes the default where none of several is: that for tools, or the first."""
        templates = self.chat_template if isinstance(self.chat_template, list) else []
        by_name = {template["name"]: template for template in templates}
        return None if "default" in by_name or not templates else by_name.get("tool_use", templates[0])

    @property
    def adds_bos(self) -> bool:
        """Return whether llama.cpp puts BOS before a text: what the file says, else llama.cpp's default."""
        return self.add_special.get("bos", self.model == "llama" or BY_NAME[self.pre].adds_bos)

    @property
    def bos(self) -> int | None:
        """Return the token that llama.cpp puts before a text, if any."""
        default = 1 if self.model == "llama" else None
        return self.special_ids.get("bos", default) if self.adds_bos else None

    def add_to(self, writer: gguf.GGUFWriter, *, space_prefix: bool = False) -> None:
        """Add the `tokenizer.*` keys.

        `space_prefix` says whether the architecture ("llama" and what derives from it) records tokenizer_config.json's
        add_prefix_space. Others have the key only where llama.cpp's default is wrong.
        """
        if self.packed:
            for key, (kind, data) in self.packed.items():
                writer.add_key_value(key, data, gguf.GGUFValueType(kind))
            return
        recorded = space_prefix and self.space_prefix_setting is not None
        if recorded:
            writer.add_add_space_prefix(bool(self.space_prefix_setting))
        writer.add_tokenizer_model(self.model)
        if self.model != "gemma4":
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
            self._add_chat_templates(writer)
        if space_prefix and len(self.tokens) == GRANITE_VOCAB_SIZE and "bos" not in self.add_special:
            writer.add_add_bos_token(False)
        if self.model != "gpt2" and not recorded and not self.adds_space_prefix:
            writer.add_add_space_prefix(False)

    def _add_chat_templates(self, writer: gguf.GGUFWriter) -> None:
        templates = self.chat_template
        if (default := self.default_template) is not None:
            templates = [*(templates or []), {**default, "name": "default"}]
        writer.add_chat_template(templates)
        # gguf-py takes the names from a set, whose order changes from run to run.
        if (names := writer.kv_data[0].get(gguf.Keys.Tokenizer.CHAT_TEMPLATES)) is not None:
            names.value.sort()


def _names(tokens: Sequence[str]) -> str:
    """Return up to five of the tokens, and how many more there are."""
    shown = ", ".join(map(repr, tokens[:5]))
    return shown if len(tokens) <= 5 else f"{shown} and {len(tokens) - 5} more"
