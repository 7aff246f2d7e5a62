"""Build Gemma 4's tokenizer: merges over text whose spaces are replaced, and bytes for what isn't in the vocabulary.

The GGUF keys follow llama.cpp's conversion/gemma.py, Gemma4Model.set_vocab. llama.cpp has a kind of tokenizer for it
that merges by tokenizer.json's list as transformers does, so that no scores need to be reconstructed, and that always
puts BOS before a text.
"""

import re

from gguf import TokenType

from d2q_edge.errors import D2QError
from d2q_edge.model.tokenizer import bpe
from d2q_edge.model.tokenizer.added import AddedToken, read_vocabulary
from d2q_edge.model.tokenizer.content import Tokenizer
from d2q_edge.model.tokenizer.endings import add_ends
from d2q_edge.model.tokenizer.files import Files
from d2q_edge.model.tokenizer.sentencepiece import ESCAPE, IDLE_PATTERN
from d2q_edge.model.tokenizer.special import special_tokens

MODEL_TYPE = "gemma4_text"
_SCORE = -1000.0
"""What llama.cpp's converter gives to every token; it is never looked at."""
_PARTS = ("channel", "tool_call", "tool_response")
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
_VISIBLE = frozenset((*(f"<|{part}>" for part in _PARTS), *(f"<{part}|>" for part in _PARTS), '<|"|>'))
"""Tokens of a conversation's structure, which llama.cpp's chat parser reads in the text."""


def build(files: Files) -> Tokenizer:
    """Return the tokenizer of tokenizer.json; raise D2QError if that is damaged or llama.cpp can't do what it says."""
    if not files.content:
        raise D2QError(f"{files.directory} has no tokenizer.json, which holds the merges of Gemma 4's tokenizer")
    content = files.content
    split = content.get("pre_tokenizer") or {"type": "Split", "pattern": IDLE_PATTERN}
    if content.get("normalizer") != ESCAPE or split["type"] != "Split" or split["pattern"] != IDLE_PATTERN:
        raise D2QError(
            f"{files.json} normalizes or splits text in another way than Gemma 4's, which llama.cpp can't do"
        )
    vocab, added, left_out = read_vocabulary(files)
    tokens, types = bpe.token_list(files, vocab, added)
    types = [_type(text, kind, added) for text, kind in zip(tokens, types, strict=True)]
    special_ids, add_special = special_tokens(files, bos_by_default=True)
    lost_ends = add_ends(files, tokens, types, special_ids)
    beside = [token for token in added.values() if token.gaps]
    return Tokenizer(
        model="gemma4",
        pre="gemma4",
        tokens=tokens,
        types=types,
        merges=bpe.joined(bpe.read_merges(files)),
        special_ids=special_ids,
        add_special={**add_special, "bos": True},
        chat_template=files.chat_template(),
        space_prefix_setting=files.space_prefix_setting,
        scores=[_SCORE] * files.vocab_size,
        gaps=frozenset().union(*(token.gaps for token in beside)),
        left_out=left_out,
        beside=tuple(token.text for token in beside),
        lost_ends=lost_ends,
    )


def _type(text: str, kind: int, added: dict[str, AddedToken]) -> int:
    if text in _VISIBLE:
        return int(TokenType.USER_DEFINED)
    return int(TokenType.BYTE) if text not in added and _BYTE.fullmatch(text) else kind
