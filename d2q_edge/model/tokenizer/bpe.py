"""Byte-level BPE: GPT-2's kind, of Llama 3, Qwen, SmolLM, Phi-4, OLMo and Mistral's Tekken.

All of it is in tokenizer.json. Anything that llama.cpp wouldn't do in the same way is refused, because a file whose
text is split differently runs and is quietly worse.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import gguf

from d2q_edge.errors import D2QError
from d2q_edge.model.tokenizer import pre_tokenizers
from d2q_edge.model.tokenizer.added import AddedToken, added_tokens, check_distinct, split_off
from d2q_edge.model.tokenizer.chat_template import read_chat_template
from d2q_edge.model.tokenizer.content import Tokenizer
from d2q_edge.model.tokenizer.files import Files
from d2q_edge.model.tokenizer.pre_tokenizers import PreTokenizer
from d2q_edge.model.tokenizer.special import special_tokens


def build(files: Files, pre_tokenizer: str | None = None) -> Tokenizer:
    """The tokenizer of tokenizer.json.

    Args:
        files: the model's.
        pre_tokenizer: llama.cpp's name for the way text is split; None finds it.

    Raises:
        D2QError: see the module.
    """
    content, model = files.content, files.content["model"]
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise D2QError(f"{files.json} sets {option}, which llama.cpp's BPE can't do")
    vocab, merges = model["vocab"], read_merges(files)
    normalized = _is_normalized(files)
    ignore_merges = bool(model.get("ignore_merges"))
    if pre_tokenizer is None:
        pre = pre_tokenizers.find(files.json, content, ignore_merges=ignore_merges)
    else:
        pre = pre_tokenizers.named(pre_tokenizer)
    added, left_out = split_off(added_tokens(files, vocab), files.vocab_size)
    vocab = {text: token_id for text, token_id in vocab.items() if text not in left_out}
    if ignore_merges != pre.ignores_merges:
        # Added tokens are found before words are.
        _require_reachable(files, pre, vocab.keys() - added.keys(), merges)
    tokens, types = _token_list(files, vocab, added)
    special_ids, add_special = special_tokens(files, bos_by_default=pre.adds_bos)
    setting = files.settings.get("add_prefix_space")
    gaps = pre.gaps | ({"decomposed"} if normalized else set())
    return Tokenizer(
        model="gpt2",
        pre=pre.name,
        tokens=tokens,
        types=types,
        # A space in a token would be taken for the one between the two; only tokens that no text becomes have one.
        merges=[" ".join(part.replace(" ", "\u0120") for part in pair) for pair in merges],
        scores=None,
        special_ids=special_ids,
        add_special=add_special,
        chat_template=read_chat_template(files.directory, files.settings),
        space_prefix_setting=setting if isinstance(setting, bool) else None,
        adds_space_prefix=False,
        gaps=gaps | ({"special"} if any(token.strips for token in added.values()) else set()),
        left_out=left_out,
    )


def read_merges(files: Files) -> list[tuple[str, str]]:
    """Merges as pairs; a tokenizer.json has them as pairs or, before 2024, as "left right".

    Raises:
        D2QError: one makes, or takes, what isn't a token.
    """
    model = files.content["model"]
    vocab = model["vocab"]
    pairs = []
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if not (left in vocab and right in vocab and left + right in vocab):
            raise D2QError(
                f"{files.json} merges {left!r} and {right!r}, but not both and the result are in its vocabulary"
            )
        pairs.append((left, right))
    return pairs


def _is_normalized(files: Files) -> bool:
    """Whether text is brought to NFC, which llama.cpp doesn't do; its converter accepts it, and most text is NFC.

    Raises:
        D2QError: it is normalized in another way.
    """
    normalizer = files.content.get("normalizer")
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    if any(step != {"type": "NFC"} for step in steps):
        raise D2QError(f"{files.json} normalizes text with {json.dumps(normalizer)}, which llama.cpp can't do for BPE")
    return bool(steps)


def _require_reachable(files: Files, pre: PreTokenizer, vocab: Iterable[str], merges: list[tuple[str, str]]) -> None:
    """Refuse a vocabulary for which it matters whether whole words are looked up before merging.

    It doesn't matter when every token of several bytes is the result of a merge: merging then finds the word, too.
    """
    results = {left + right for left, right in merges}
    for token in sorted(vocab):
        if len(token) > 1 and token not in results:
            raise D2QError(
                f"{files.json} sets ignore_merges to {str(not pre.ignores_merges).lower()}, unlike llama.cpp's "
                f"{pre.name}, which matters for tokens such as {token!r}"
            )


def _token_list(files: Files, vocab: dict[str, int], added: dict[str, AddedToken]) -> tuple[list[str], list[int]]:
    """Texts and types of the ids 0 .. vocab_size - 1, by the rules of llama.cpp's converter."""
    tokens = [f"[PAD{i}]" for i in range(files.vocab_size)]
    types = [int(gguf.TokenType.UNUSED)] * files.vocab_size
    owners: dict[int, str] = {}
    for text, token_id in _all_ids(vocab, added):
        if type(token_id) is not int or not 0 <= token_id < files.vocab_size:
            raise D2QError(
                f"{files.json} gives token {text!r} the id {token_id}, but the model has {files.vocab_size} tokens only"
            )
        if owners.setdefault(token_id, text) != text:
            raise D2QError(f"{files.json} gives the id {token_id} to both {owners[token_id]!r} and {text!r}")
        tokens[token_id] = added[text].gguf_text if text in added else text
        types[token_id] = added[text].type if text in added else int(gguf.TokenType.NORMAL)
    check_distinct(files, tokens)
    return tokens, types


def _all_ids(vocab: dict[str, Any], added: dict[str, AddedToken]) -> Iterator[tuple[str, Any]]:
    yield from vocab.items()
    for text, token in added.items():
        yield text, token.id
