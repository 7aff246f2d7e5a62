"""Take a tokenizer over from a GGUF file: all its tokenizer.* keys are written again as they are."""

from collections.abc import Mapping
from typing import Any

import gguf

from d2q_edge.errors import D2QError
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.model.tokenizer.content import Tokenizer
from d2q_edge.model.tokenizer.pre_tokenizers import BY_NAME
from d2q_edge.model.tokenizer.special import ROLES

PREFIX, TEMPLATE = "tokenizer.", "tokenizer.chat_template"
MODELS = ("gpt2", "llama", "gemma4")
"""llama.cpp's names of byte-level BPE, of SentencePiece's BPE and of Gemma 4's."""


def tokenizer_of(file: GGUFFile, vocab_size: int) -> Tokenizer:
    """Return a file's tokenizer; raise D2QError if it has none for `vocab_size` tokens, or one of another kind."""
    path, kv = file.path, file.kv
    model, pre = kv.get("tokenizer.ggml.model"), kv.get("tokenizer.ggml.pre", "default")
    if model not in MODELS:
        what = "no tokenizer" if model is None else f"a tokenizer of the kind {model!r:.40}"
        raise D2QError(f"{path} has {what}; only files with BPE ({', '.join(MODELS)}) can be converted")
    if model == "gpt2" and not (isinstance(pre, str) and pre in BY_NAME):
        raise D2QError(f"{path} has the pre-tokenizer {pre!r:.40}, which the llama.cpp of d2q-edge doesn't know")
    tokens: Any = kv.get("tokenizer.ggml.tokens")
    types: Any = kv.get("tokenizer.ggml.token_type", [int(gguf.TokenType.NORMAL)] * vocab_size)
    for what, values, kind in (("tokens", tokens, str), ("token types", types, int)):
        if not isinstance(values, list) or len(values) != vocab_size or not all(type(one) is kind for one in values):
            raise D2QError(f"{path} is malformed: its tokenizer's {what} aren't {vocab_size}, one for each embedding")
    ids = {role: kv.get(getattr(gguf.Keys.Tokenizer, f"{role.upper()}_ID", "")) for role in (*ROLES, "eot")}
    adds = {role: kv.get(f"tokenizer.ggml.add_{role}_token") for role in ROLES}
    return Tokenizer(
        model=str(model),
        pre=str(pre),
        tokens=tokens,
        types=types,
        merges=[],
        special_ids={role: token for role, token in ids.items() if type(token) is int and 0 <= token < vocab_size},
        add_special={role: value for role, value in adds.items() if isinstance(value, bool)},
        chat_template=_chat_template(kv),
        space_prefix_setting=None,
        packed={key: packed for key, packed in file.packed.items() if key.startswith(PREFIX)},
    )


def _chat_template(kv: Mapping[str, Any]) -> str | list[dict[str, str]] | None:
    """Return the chat template, or several with their names."""
    templates = {key.removeprefix(f"{TEMPLATE}."): text for key, text in kv.items() if key.startswith(f"{TEMPLATE}.")}
    templates = {"default": kv.get(TEMPLATE), **templates}
    found = [{"name": name, "template": text} for name, text in templates.items() if isinstance(text, str)]
    if [entry["name"] for entry in found] == ["default"]:
        return found[0]["template"]
    return found or None
