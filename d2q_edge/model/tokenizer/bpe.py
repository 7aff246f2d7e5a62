"""Build byte-level BPE tokenizers (GPT-2's kind): Llama 3, Qwen, SmolLM, Phi-4, OLMo and Mistral's Tekken.

All of it is in tokenizer.json; the GGUF keys follow llama.cpp's conversion/base.py, _set_vocab_gpt2. Whatever llama.cpp
would do differently is refused, because a model whose text is split differently runs, but is quietly worse.
"""

import json
from collections.abc import Iterable

import gguf

from d2q_edge.errors import D2QError
from d2q_edge.model.tokenizer import pre_tokenizers
from d2q_edge.model.tokenizer.added import AddedToken, check_distinct, read_vocabulary
from d2q_edge.model.tokenizer.content import Tokenizer
from d2q_edge.model.tokenizer.endings import add_ends
from d2q_edge.model.tokenizer.files import Files
from d2q_edge.model.tokenizer.pre_tokenizers import PreTokenizer
from d2q_edge.model.tokenizer.special import special_tokens


def build(files: Files, pre_tokenizer: str | None = None) -> Tokenizer:
    """Return the tokenizer of tokenizer.json; raise D2QError if that is damaged or llama.cpp can't do what it says."""
    content, model = files.content, files.content["model"]
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise D2QError(f"{files.json} sets {option}, which llama.cpp's BPE can't do")
    merges, normalized = read_merges(files), _is_normalized(files)
    ignore_merges = bool(model.get("ignore_merges"))
    if pre_tokenizer is None:
        pre = pre_tokenizers.find(files.json, content, ignore_merges=ignore_merges)
    else:
        pre = pre_tokenizers.named(pre_tokenizer)
    vocab, added, left_out = read_vocabulary(files)
    if ignore_merges != pre.ignores_merges:
        # Added tokens are found before words are.
        _require_reachable(files, pre, vocab.keys() - added.keys(), merges)
    tokens, types = token_list(files, vocab, added)
    special_ids, add_special = special_tokens(files, bos_by_default=pre.adds_bos)
    lost_ends = add_ends(files, tokens, types, special_ids)
    beside = [token for token in added.values() if token.gaps]
    return Tokenizer(
        model="gpt2",
        pre=pre.name,
        tokens=tokens,
        types=types,
        merges=joined(merges),
        special_ids=special_ids,
        add_special=add_special,
        chat_template=files.chat_template(),
        space_prefix_setting=files.space_prefix_setting,
        gaps=pre.gaps.union({"decomposed"} if normalized else (), *(token.gaps for token in beside)),
        left_out=left_out,
        beside=tuple(token.text for token in beside),
        lost_ends=lost_ends,
    )


def read_merges(files: Files) -> list[tuple[str, str]]:
    """Return tokenizer.json's merges, which are pairs or, before 2024, "left right"; all parts must be tokens."""
    vocab, pairs = files.content["model"]["vocab"], []
    for merge in files.content["model"]["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if not (left in vocab and right in vocab and left + right in vocab):
            raise D2QError(
                f"{files.json} merges {left!r} and {right!r}, but not both and the result are in its vocabulary"
            )
        pairs.append((left, right))
    return pairs


def joined(merges: Iterable[tuple[str, str]]) -> list[str]:
    """Return merges as the file has them."""
    # A space inside of a part would be taken for the separator; only tokens that no text becomes have one.
    return [" ".join(part.replace(" ", "\u0120") for part in pair) for pair in merges]


def _is_normalized(files: Files) -> bool:
    """Return whether text is normalized to NFC, which llama.cpp doesn't do, but its converter accepts."""
    normalizer = files.content.get("normalizer")
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    if any(step != {"type": "NFC"} for step in steps):
        raise D2QError(f"{files.json} normalizes text with {json.dumps(normalizer)}, which llama.cpp can't do for BPE")
    return bool(steps)


def _require_reachable(files: Files, pre: PreTokenizer, vocab: Iterable[str], merges: list[tuple[str, str]]) -> None:
    """Refuse a vocabulary for which it matters whether whole words are looked up before merging.

    It doesn't matter if every token of several bytes is the result of a merge, because merging then finds the word too.
    """
    results = {left + right for left, right in merges}
    for token in sorted(vocab):
        if len(token) > 1 and token not in results:
            raise D2QError(
                f"{files.json} sets ignore_merges to {str(not pre.ignores_merges).lower()}, unlike llama.cpp's "
                f"{pre.name}, which matters for tokens such as {token!r}"
            )


def token_list(files: Files, vocab: dict[str, int], added: dict[str, AddedToken]) -> tuple[list[str], list[int]]:
    """Return texts and types of the ids 0 .. vocab_size - 1, by the rules of llama.cpp's converter."""
    tokens = [f"[PAD{i}]" for i in range(files.vocab_size)]
    types = [int(gguf.TokenType.UNUSED)] * files.vocab_size
    owners: dict[int, str] = {}
    for text, token_id in (vocab | {text: token.id for text, token in added.items()}).items():
        files.check_id(text, token_id)
        if owners.setdefault(token_id, text) != text:
            raise D2QError(f"{files.json} gives the id {token_id} to both {owners[token_id]!r} and {text!r}")
        tokens[token_id] = added[text].gguf_text if text in added else text
        types[token_id] = added[text].type if text in added else int(gguf.TokenType.NORMAL)
    check_distinct(files, tokens)
    return tokens, types
