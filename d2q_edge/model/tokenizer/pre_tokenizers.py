"""Map the pre-tokenizer of a tokenizer.json to llama.cpp's name for it.

llama.cpp splits text with its own code, chosen by name (src/llama-vocab.cpp). Its converter looks the name up by a hash
of one text's tokens (conversion/base.py, get_vocab_base_pre), which covers published vocabularies only; this module
compares steps and regexes, so that new vocabularies are recognized too.
"""

import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from d2q_edge.errors import D2QError


@dataclass(frozen=True)
class PreTokenizer:
    """One of llama.cpp's pre-tokenizers."""

    name: str  # the value of tokenizer.ggml.pre
    ignores_merges: bool = False  # whether a whole word is looked up before anything is merged
    adds_bos: bool = False  # whether BOS is added if the file doesn't say
    gaps: frozenset[str] = frozenset()  # kinds of text that llama.cpp splits differently from the original regex


_LLAMA_3 = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano")
# llama.cpp's regex has no combining marks, and "letters but a-z" where the original has upper case.
_ASCII_CASE = frozenset({"camel", "marks"})
_SPECIAL = (
    *(PreTokenizer(name, ignores_merges=True, adds_bos=True) for name in _LLAMA_3),
    PreTokenizer("tekken", ignores_merges=True, adds_bos=True, gaps=_ASCII_CASE),
    PreTokenizer("chameleon", adds_bos=True),
    PreTokenizer("gemma4", adds_bos=True),
    PreTokenizer("granite-embed-multi-311m", adds_bos=True),
    *(PreTokenizer(name, ignores_merges=True) for name in ("minicpm5", "youtu", "glm4", "glm5")),
    PreTokenizer("granite-embed-multi-97m", ignores_merges=True, gaps=_ASCII_CASE),
    *(PreTokenizer(name, gaps=_ASCII_CASE) for name in ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2")),
)
_PLAIN = (
    "default deepseek-llm deepseek-coder deepseek-v3 spark2_5 falcon mpt starcoder gpt-2 phi-2 jina-es "
    "jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert jais-2 sarvam-moe jina-v1-en "
    "jina-v2-code roberta-bpe whitespace refact command-r qwen2 deepseek-r1-qwen kormo f2llmv2 qwen35 "
    "stablelm2 olmo dbrx smaug-bpe poro-chat chatglm-bpe viking jais smollm codeshell bloom gpt3-finnish "
    "exaone exaone4 exaone-moe minerva-7b megrez tiny_aya cohere2moe superbpe trillion granite-docling "
    "bailingmoe bailingmoe2 llada-moe seed-coder hunyuan hunyuan-dense hy_v4 joyai-llm kimi-k2 ufakzeka "
    "grok-2 afmoe laguna solar-open mellum2"
)
BY_NAME = {pre.name: pre for pre in (*_SPECIAL, *map(PreTokenizer, _PLAIN.split()))}
"""Every name that llama.cpp accepts."""

# Parts of the regexes below; _CASED is shared by Tekken and GPT-4o.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
REGEXES: dict[str, tuple[str, ...]] = {
    _WORDS + r"\p{N}{1,3}" + _REST: ("llama-bpe", "dbrx"),
    _WORDS + r"\p{N}" + _REST: ("qwen2",),
    _CASED % ("", "") + r"|\p{N}" + _CASED_REST: ("tekken",),
    _CASED % (_CONTRACTIONS + "?", _CONTRACTIONS + "?") + r"|\p{N}{1,3}" + _CASED_REST: ("gpt-4o",),
}
"""Each regex with the names that stand for it, the usual one first; they differ in ignores_merges."""

_BYTES = {"type": "ByteLevel", "add_prefix_space": False}
_GPT_2 = [{**_BYTES, "use_regex": True}]
_DIGITS = [{"type": "Digits", "individual_digits": True}, *_GPT_2]


def find(path: Path, content: dict[str, Any], *, ignore_merges: bool) -> PreTokenizer:
    """Return the pre-tokenizer of llama.cpp that splits text as that tokenizer.json; raise D2QError if there is none.

    `ignore_merges`, the tokenizer's setting, decides between names for the same regex.
    """
    steps = _steps(content.get("pre_tokenizer"))
    names: tuple[str, ...] = ()
    if steps == _DIGITS:
        names = ("smollm",)
    elif steps == _GPT_2:
        # GPT-2's regex under several names; GPT-NeoX's and OLMo's vocabularies are the normalized ones.
        names = ("olmo",) if content.get("normalizer") else ("gpt-2",)
    elif len(steps) == 2 and steps[0].get("type") == "Split" and steps[1] == {**_BYTES, "use_regex": False}:
        names = REGEXES.get(_regex(steps[0]) or "", ())
    if not names:
        regex = next((_regex(step) for step in steps if _regex(step) is not None), None)
        quoted = json.dumps(content.get("pre_tokenizer"), ensure_ascii=False) if regex in (None, *REGEXES) else regex
        known = ", ".join([*chain(*REGEXES.values()), "smollm", "gpt-2", "olmo"])
        raise D2QError(
            f"{path} splits text in a way that isn't known (known: {known}): {quoted}; if you know which of "
            "llama.cpp's pre-tokenizers it is, say --pre-tokenizer NAME"
        )
    choices = [BY_NAME[name] for name in names]
    return next((choice for choice in choices if choice.ignores_merges == ignore_merges), choices[0])


def named(name: str) -> PreTokenizer:
    """Return the pre-tokenizer of that name; raise D2QError if llama.cpp has none."""
    if name not in BY_NAME:
        raise D2QError(f"llama.cpp has no pre-tokenizer {name!r}; it has {', '.join(sorted(BY_NAME))}")
    return BY_NAME[name]


def _steps(pre_tokenizer: Any) -> list[dict[str, Any]]:
    """Flatten a pre-tokenizer into its steps, without the option that only concerns offsets."""
    if not pre_tokenizer:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [step for inner in pre_tokenizer["pretokenizers"] for step in _steps(inner)]
    return [{key: value for key, value in pre_tokenizer.items() if key != "trim_offsets"}]


def _regex(step: dict[str, Any]) -> str | None:
    """Return the regex of a step that makes every match a piece; the known ones match all text, so nothing is lost."""
    isolates = (step.get("behavior"), step.get("invert")) in (("Isolated", False), ("Removed", True))
    regex = step["pattern"].get("Regex") if step.get("type") == "Split" and isolates else None
    return regex if isinstance(regex, str) else None
