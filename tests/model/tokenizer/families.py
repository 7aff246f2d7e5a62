"""Tiny tokenizers of real model families, with the same files as on the hub."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.model.tokenizer.tokenizers import (
    Json,
    add_tokens,
    bos_template,
    byte_level,
    sentencepiece_json,
    sentencepiece_model,
    write,
)

_NAMES: dict[str, Json] = {"<unk>": {}, "<s>": {}, "</s>": {}}
_RUNS = ("\n", "\n\n", "\n\n\n", "\u2581\u2581", "\u2581\u2581\u2581")
_ESCAPE: Json = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
LEGACY: Json = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, _ESCAPE]}
METASPACE: Json = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
_IDLE: Json = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


@dataclass(frozen=True)
class Family:
    """One family's tokenizer.

    Attributes:
        architecture, model_type, tokenizer_class: as the hub's files have them.
        pre: llama.cpp's name for its pre-tokenizer.
        added: added tokens with their options.
        bos: the token before every text.
        base: for byte-level BPE, whose pre-tokenizer and vocabulary.
        prefix: for SentencePiece, whether its model puts a space before the text.
        normalizer, pre_tokenizer: for SentencePiece, tokenizer.json's.
        settings: more of tokenizer_config.json.
        vocab_size: rows of the embeddings.
    """

    architecture: str
    model_type: str
    tokenizer_class: str
    pre: str
    added: dict[str, Json]
    bos: str | None = None
    base: str | None = None
    prefix: bool = True
    normalizer: Json | None = None
    pre_tokenizer: Json | None = None
    settings: Json = field(default_factory=dict)
    vocab_size: int = 624

    def config(self) -> Json:
        """Return a config.json that is complete enough for llama.cpp's converter."""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "bos_token_id": None,
            "eos_token_id": 2,
            "pad_token_id": None,
            "hidden_size": 64,
            "intermediate_size": 128,
            "moe_intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "max_position_embeddings": 128,
            "original_max_position_embeddings": 128,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "sliding_window": 64,
        }

    def write(self, directory: Path, *, keep: tuple[str, ...] = ("json", "model")) -> Path:
        """Write the files (of SentencePiece's two, those in `keep`) and return the directory."""
        if self.base is not None:
            model = None
            content = json.loads(byte_level(self.base))
        else:
            model = sentencepiece_model(prefix=self.prefix, symbols=() if self.prefix else ("<pad>", *_RUNS))
            content = sentencepiece_json(model, self.normalizer, self.pre_tokenizer)
        add_tokens(content, self.added)
        if self.bos is not None:
            content["post_processor"] = bos_template(content, self.bos)
        elif self.base is not None:
            content["post_processor"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        settings: dict[str, Any] = {"tokenizer_class": self.tokenizer_class, **self.settings}
        kept = content if self.base is not None or "json" in keep else None
        return write(directory, self.config(), settings, kept, model if "model" in keep else None)


_LLAMA_SETTINGS: Json = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "legacy": False,
}
_QWEN: Json = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None, "add_bos_token": False}
_QWEN_ADDED: dict[str, Json] = {
    "<|endoftext|>": {},
    "<|im_start|>": {},
    "<|im_end|>": {},
    "<tool_call>": {"special": False},
}
_LLAMA_3_ADDED: dict[str, Json] = {"<|begin_of_text|>": {}, "<|end_of_text|>": {}, "<|eot_id|>": {}}
FAMILIES: dict[str, Family] = {
    "llama2": Family(
        "LlamaForCausalLM",
        "llama",
        "LlamaTokenizer",
        "default",
        {**_NAMES, "<pad>": {}},
        bos="<s>",
        normalizer=LEGACY,
        settings={**_LLAMA_SETTINGS, "pad_token": "<pad>", "add_prefix_space": True},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        "mistral",
        "LlamaTokenizer",
        "default",
        {**_NAMES, "[INST]": {}, "[/INST]": {}, "[TOOL_CALLS]": {}},
        bos="<s>",
        pre_tokenizer=METASPACE,
        settings={
            **_LLAMA_SETTINGS,
            "chat_template": [{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}],
        },
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        "phi3",
        "LlamaTokenizer",
        "default",
        {
            **_NAMES,
            "</s>": {"special": False, "rstrip": True},
            "<|endoftext|>": {},
            "<|assistant|>": {"rstrip": True},
            "<|end|>": {"rstrip": True},
        },
        bos="<s>",
        normalizer=LEGACY,
        settings={**_LLAMA_SETTINGS, "eos_token": "<|endoftext|>", "chat_template": "{{ messages }}"},
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        "gemma3_text",
        "GemmaTokenizer",
        "default",
        {**_NAMES, "<pad>": {}, **{run: {"special": False} for run in _RUNS}, "<start_of_turn>": {}, "<unused0>": {}},
        bos="<s>",
        prefix=False,
        normalizer=_ESCAPE,
        pre_tokenizer=_IDLE,
        settings={**_LLAMA_SETTINGS, "pad_token": "<pad>"},
    ),
    "llama3": Family(
        "LlamaForCausalLM",
        "llama",
        "PreTrainedTokenizerFast",
        "llama-bpe",
        _LLAMA_3_ADDED,
        bos="<|begin_of_text|>",
        base="llama3",
        settings={"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    ),
    "tekken": Family(
        "MistralForCausalLM",
        "mistral",
        "PreTrainedTokenizerFast",
        "tekken",
        {**_NAMES, "[INST]": {}, "[/INST]": {}},
        bos="<s>",
        base="tekken",
        settings={"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_prefix_space": False},
    ),
    "qwen2": Family("Qwen2ForCausalLM", "qwen2", "Qwen2Tokenizer", "qwen2", _QWEN_ADDED, base="qwen2", settings=_QWEN),
    "qwen3moe": Family(
        "Qwen3MoeForCausalLM", "qwen3_moe", "Qwen2Tokenizer", "qwen2", _QWEN_ADDED, base="qwen2", settings=_QWEN
    ),
    # The size of SmolLM2's vocabulary makes llama.cpp's converter write one more key.
    "smollm2": Family(
        "LlamaForCausalLM",
        "llama",
        "GPT2Tokenizer",
        "smollm",
        _QWEN_ADDED,
        base="smollm2",
        settings={"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
        vocab_size=49152,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        "smollm3",
        "PreTrainedTokenizerFast",
        "llama-bpe",
        {**_LLAMA_3_ADDED, "<think>": {"special": False}},
        base="llama3",
        settings={"eos_token": "<|eot_id|>"},
    ),
    "phi4": Family(
        "Phi3ForCausalLM",
        "phi3",
        "GPT2Tokenizer",
        "gpt-4o",
        {"<|endoftext|>": {}, "<|end|>": {"rstrip": True}, "<|tool|>": {"rstrip": True, "special": False}},
        base="phi4",
        settings={"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "add_bos_token": False},
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        "olmoe",
        "GPTNeoXTokenizer",
        "olmo",
        {"|||IP_ADDRESS|||": {"special": False}, "<|padding|>": {}, "<|endoftext|>": {}, "  ": {"special": False}},
        base="olmoe",
        settings={"eos_token": "<|endoftext|>", "add_bos_token": False, "add_eos_token": False},
    ),
}
GEMMA4 = Family(
    "Gemma4ForCausalLM",
    "gemma4_text",
    "GemmaTokenizer",
    "gemma4",
    {**_NAMES, "<pad>": {}, "<mask>": {}, "<|tool_call>": {}},
    bos="<s>",
    prefix=False,
    normalizer=_ESCAPE,
    pre_tokenizer=_IDLE,
    settings={**_LLAMA_SETTINGS, "pad_token": "<pad>", "extra_special_tokens": {"stc_token": "<|tool_call>"}},
)


def write_gemma4(directory: Path, vocab_size: int) -> Path:
    """Write Gemma 4's tokenizer, whose vocabulary is filled up with tokens that no text becomes."""
    GEMMA4.write(directory, keep=("json",))
    content = json.loads((directory / "tokenizer.json").read_text("utf-8"))
    vocab = content["model"]["vocab"]
    for token in content["added_tokens"]:
        vocab.setdefault(token["content"], token["id"])
    for token_id in range(len(vocab), vocab_size):
        vocab[f"\u2581unused{token_id}"] = token_id
    content["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ],
    }
    (directory / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    return directory


SENTENCEPIECE = tuple(name for name, family in FAMILIES.items() if family.base is None)
