"""The tokenizer of a Hugging Face model, as a GGUF wants it: tokens, types, merges, pre-tokenizer name, special ids.

Reads byte-level BPE tokenizers (tokenizer.json). llama.cpp splits text with code of its own, chosen by name, so the
name must stand for exactly the regex in tokenizer.json; anything that isn't recognized is refused, because a file whose
text is split differently runs and is quietly worse. This module doesn't tokenize and doesn't look at the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from d2q_edge.checkpoint import read_json_object
from d2q_edge.errors import D2QError

# What the two splitting regexes below share, before and after their rule for digits.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class PreTokenizer:
    """One of llama.cpp's ways to split text: its name, and whether it looks a whole word up before merging."""

    name: str
    ignores_merges: bool


PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    _WORDS + r"\p{N}{1,3}" + _REST: PreTokenizer("llama-bpe", ignores_merges=True),
    _WORDS + r"\p{N}" + _REST: PreTokenizer("qwen2", ignores_merges=False),
}

# Special tokens by their role, in the order in which llama.cpp's converter writes them.
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer ready to be written. `types` are gguf.TokenType values; `tokens` has one entry per model row."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special_ids: dict[str, int]
    """Role ("bos", "eos", "pad", ...) to token id."""
    add_special: dict[str, bool]
    """Role to whether tokenizing a text adds that token."""
    chat_template: str | list[dict[str, str]] | None
    add_space_prefix: bool | None
    """tokenizer_config.json's add_prefix_space, which some architectures record."""

    def add_to(self, writer: gguf.GGUFWriter, *, space_prefix: bool = False) -> None:
        """Add the `tokenizer.*` keys; add_space_prefix among them only when `space_prefix` is set."""
        if space_prefix and self.add_space_prefix is not None:
            writer.add_add_space_prefix(self.add_space_prefix)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        for role, token_id in self.special_ids.items():
            getattr(writer, f"add_{role}_token_id")(token_id)
        for role, value in self.add_special.items():
            if hasattr(writer, f"add_add_{role}_token"):
                getattr(writer, f"add_add_{role}_token")(value)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def read_tokenizer(directory: Path, config: Mapping[str, Any], vocab_size: int) -> Tokenizer:
    """Read tokenizer.json, tokenizer_config.json and chat templates of a model directory.

    Args:
        directory: where the files are.
        config: config.json's content; its `ROLE_token_id` entries are the last resort for special ids.
        vocab_size: rows of the embedding matrix; ids beyond the tokenizer's become unused "[PADi]" tokens.

    Raises:
        D2QError: tokenizer.json is missing, unreadable, not byte-level BPE, or splits text in an unknown way.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        if (directory / "tokenizer.model").is_file():
            raise D2QError(f"{directory} has a SentencePiece tokenizer.model only, which isn't supported yet")
        raise D2QError(f"{directory} has no tokenizer.json; download the tokenizer files too")
    content = read_json_object(path)
    settings_file = directory / "tokenizer_config.json"
    settings = read_json_object(settings_file) if settings_file.is_file() else {}
    try:
        return _build(path, content, settings, config, vocab_size)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise D2QError(f"{path} doesn't have the structure of a tokenizer ({error!r})") from error


def _build(
    path: Path, content: dict[str, Any], settings: dict[str, Any], config: Mapping[str, Any], vocab_size: int
) -> Tokenizer:
    model = content["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise D2QError(
            f"{path} holds a {model.get('type')} tokenizer{' with byte fallback' if model.get('byte_fallback') else ''}"
            "; only byte-level BPE is supported yet"
        )
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise D2QError(f"{path} sets {option}, which llama.cpp's BPE can't do")
    merges = _merges(model["merges"])
    pre = _recognize(path, content)
    if bool(model.get("ignore_merges")) != pre.ignores_merges:
        _require_reachable(path, pre, model["vocab"], merges)
    added = _added_tokens(path, content, settings, model["vocab"])
    tokens, types = _token_list(path, model["vocab"], added, vocab_size)
    special_ids, add_special = _special_tokens(content, settings, config, vocab_size)
    space_prefix = settings.get("add_prefix_space")
    return Tokenizer(
        pre=pre.name,
        tokens=tokens,
        types=types,
        merges=[" ".join(pair) for pair in merges],
        special_ids=special_ids,
        add_special=add_special,
        chat_template=_chat_template(path.parent, settings),
        add_space_prefix=space_prefix if isinstance(space_prefix, bool) else None,
    )


def _merges(merges: list[Any]) -> list[tuple[str, str]]:
    """Merges as pairs; a tokenizer.json has them as pairs or, before 2024, as "left right"."""
    pairs = []
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        pairs.append((left, right))
    return pairs


def _recognize(path: Path, content: dict[str, Any]) -> PreTokenizer:
    """Match normalizer and pre-tokenizer against those that llama.cpp has.

    NFC is accepted although llama.cpp doesn't apply it: its own converter does the same, and text is NFC nearly always.
    """
    normalizer = content.get("normalizer")
    if normalizer is not None and normalizer != {"type": "NFC"}:
        raise D2QError(f"{path} normalizes text with {json.dumps(normalizer)}, which llama.cpp can't do for BPE")
    pre_tokenizer = content.get("pre_tokenizer") or {}
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    regex = next((step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"), None)
    known = PRE_TOKENIZERS.get(regex) if regex is not None else None
    shape = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ]
    # trim_offsets only concerns positions in the text, not the tokens.
    found = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    if known is None or found != shape:
        quoted = regex if known is None and regex is not None else json.dumps(pre_tokenizer, ensure_ascii=False)
        names = ", ".join(pre.name for pre in PRE_TOKENIZERS.values())
        raise D2QError(f"{path} splits text in a way that isn't known (known: {names}): {quoted}")
    return known


def _require_reachable(path: Path, pre: PreTokenizer, vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """Refuse a vocabulary for which it matters whether whole words are looked up before merging.

    It doesn't matter when every token of several bytes is the result of a merge: merging then finds the word, too.
    """
    results = {left + right for left, right in merges}
    for token in vocab:
        if len(token) > 1 and token not in results:
            raise D2QError(
                f"{path} sets ignore_merges to {str(not pre.ignores_merges).lower()}, unlike llama.cpp's {pre.name}, "
                f"which matters for tokens such as {token!r}"
            )


def _added_tokens(
    path: Path, content: dict[str, Any], settings: dict[str, Any], vocab: dict[str, int]
) -> dict[str, tuple[int, bool]]:
    """Added tokens, {text: (id, special)}: tokenizer.json's, and those that only tokenizer_config.json has."""
    added = {token["content"]: (token["id"], bool(token.get("special"))) for token in content.get("added_tokens") or []}
    for key, token in (settings.get("added_tokens_decoder") or {}).items():
        text, token_id = token["content"], int(key)
        known = added[text][0] if text in added else vocab.get(text, token_id)
        if known != token_id:
            raise D2QError(f"{path} gives token {text!r} the id {known}, but tokenizer_config.json gives it {token_id}")
        added[text] = (token_id, bool(token.get("special")))
    return added


def _token_list(
    path: Path, vocab: dict[str, int], added: dict[str, tuple[int, bool]], vocab_size: int
) -> tuple[list[str], list[int]]:
    """Texts and types of the ids 0 .. vocab_size - 1, by the rules of llama.cpp's converter."""
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [int(gguf.TokenType.UNUSED)] * vocab_size
    owners: dict[int, str] = {}
    for text, token_id in _all_ids(vocab, added):
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise D2QError(f"{path} gives token {text!r} the id {token_id}, but the model has {vocab_size} tokens only")
        if owners.setdefault(token_id, text) != text:
            raise D2QError(f"{path} gives the id {token_id} to both {owners[token_id]!r} and {text!r}")
        if text not in added:
            kind = gguf.TokenType.NORMAL
        elif added[text][1] or _looks_special(text):
            kind = gguf.TokenType.CONTROL
        else:
            kind = gguf.TokenType.USER_DEFINED
            text = text.replace("\u2581", " ")
        tokens[token_id], types[token_id] = text, int(kind)
    return tokens, types


def _all_ids(vocab: dict[str, int], added: dict[str, tuple[int, bool]]) -> Iterator[tuple[str, int]]:
    yield from vocab.items()
    for text, (token_id, _) in added.items():
        yield text, token_id


def _looks_special(text: str) -> bool:
    """Whether a token is meant for control although nobody marked it (the list is llama.cpp's)."""
    bracketed = (text.startswith("<|") and text.endswith("|>")) or (text.startswith("<｜") and text.endswith("｜>"))
    return bracketed or text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or text.startswith("<unused")


def _special_tokens(
    content: dict[str, Any], settings: dict[str, Any], config: Mapping[str, Any], vocab_size: int
) -> tuple[dict[str, int], dict[str, bool]]:
    """Ids of the special tokens by role, and which of them are added to every text.

    As in llama.cpp's converter: what the post-processor does wins over tokenizer_config.json's add_ROLE_token; ids come
    from tokenizer_config.json's texts, then from config.json.
    """
    texts = {role: _text_of(settings.get(f"{role}_token")) for role in ROLES}
    texts["bos"] = texts["bos"] or texts["cls"]
    texts["eos"] = texts["eos"] or texts["sep"]
    add: dict[str, bool] = {}
    post_processor = content.get("post_processor") or {}
    for step in post_processor.get("processors", [post_processor] if post_processor else []):
        if step["type"] == "ByteLevel":
            add.setdefault("bos", False)
            add.setdefault("eos", False)
        elif step["type"] == "TemplateProcessing":
            _read_template(step, texts, add)
        else:
            raise D2QError(f"tokenizer.json's post-processor {step['type']} isn't supported")
    ids = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    special: dict[str, int] = {}
    for role in texts:
        flag = settings.get(f"add_{role}_token")
        if isinstance(flag, bool):
            add.setdefault(role, flag)
        if settings and texts[role] in ids:
            special[role] = ids[texts[role]]
    for role in texts:
        token_id = config.get(f"{role}_token_id")
        if type(token_id) is int and 0 <= token_id < vocab_size:
            special.setdefault(role, token_id)
    return special, add


def _read_template(step: dict[str, Any], texts: dict[str, str | None], add: dict[str, bool]) -> None:
    """Read from a TemplateProcessing step which special tokens surround a text. Updates `texts` and `add`."""
    single, pair = ([_special_id(piece) for piece in step.get(key) or []] for key in ("single", "pair"))
    if len(single) < 2:
        return
    first, last = single[0], single[-1]
    if first is not None:
        # Whatever tokenizer_config.json calls BOS: this is what transformers puts first, so llama.cpp must, too.
        texts["bos"] = first
        add["bos"] = True
    if last is not None:
        if texts["eos"] not in (None, last):
            # A chat model whose turns end otherwise than its texts: what tokenizer_config.json calls EOS ends a turn.
            texts["eot"] = texts["eos"]
        texts["eos"] = last
        add["eos"] = True
    if first is not None and pair[:1] == [first]:
        pair = pair[1:]
    if last is not None and pair[-1:] == [last]:
        pair = pair[:-1]
    if between := pair[1:-1]:
        enders = (texts["sep"], texts["eos"])
        add["sep"] = (between[0] in enders and last is None) or (len(between) == 2 and between[1] in enders)


def _special_id(piece: dict[str, Any]) -> str | None:
    """The text of a template's special token, None for a place of text."""
    token = piece.get("SpecialToken")
    return None if token is None else str(token["id"])


def _text_of(entry: Any) -> str | None:
    """tokenizer_config.json has special tokens as texts or as objects with a "content"."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) and entry else None


def _chat_template(directory: Path, settings: dict[str, Any]) -> str | list[dict[str, str]] | None:
    """The chat template: tokenizer_config.json's, else chat_template.jinja's, else chat_template.json's."""
    template = settings.get("chat_template")
    if template is not None:
        if not isinstance(template, (str, list)):
            raise D2QError(f"{directory / 'tokenizer_config.json'}: chat_template must be a text or a list")
        return template
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        try:
            default = jinja.read_text(encoding="utf-8")
            more = sorted((directory / "additional_chat_templates").glob("*.jinja"))
            if not more:
                return default
            named = [{"name": file.stem, "template": file.read_text(encoding="utf-8")} for file in more]
            return [{"name": "default", "template": default}, *named]
        except (OSError, UnicodeDecodeError) as error:
            raise D2QError(f"can't read the chat template in {directory}: {error}") from error
    if (directory / "chat_template.json").is_file():
        template = read_json_object(directory / "chat_template.json").get("chat_template")
        return template if isinstance(template, str) else None
    return None
