"""Write tiny random checkpoints: configs, weights and tokenizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from d2q_edge.model.families import family_for
from tests.paths import ROOT

EXAMPLE = ROOT / "examples" / "tiny-qwen3"
LLAMA_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
BASE_CONFIG: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 4100,
}
FAMILY_CONFIG: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "bos_token_id": 4093, "eos_token_id": 4095},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32},
}
EXPERTS_CONFIG: dict[str, dict[str, Any]] = {
    "qwen3moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": 32,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    "olmoe": {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "num_key_value_heads": 4,
    },
}


def write_checkpoint(
    directory: Path, family: str, *, dtype: torch.dtype = torch.bfloat16, shards: int = 1, **config: Any
) -> None:
    """Write a checkpoint with seeded random weights (norms near one) to a new directory.

    `family` is a key of FAMILY_CONFIG or EXPERTS_CONFIG; `config` overrides config.json's entries. With several shards
    there is an index. The tokenizer is the example's, with 4096 tokens.
    """
    directory.mkdir()
    settings = {**BASE_CONFIG, **(FAMILY_CONFIG | EXPERTS_CONFIG)[family], **config}
    (directory / "config.json").write_text(json.dumps(settings))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for tensor, shape in family_for(settings).tensor_shapes().items():
        values = torch.randn(shape, generator=generator) * 0.05
        tensors[tensor] = (values + 1 if "norm" in tensor else values).to(dtype)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        for index in range(shards):
            file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
            part = dict(list(tensors.items())[index::shards])
            save_file(part, directory / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(part, file))
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    _write_tokenizer(directory, family)


def _write_tokenizer(directory: Path, family: str) -> None:
    """Write the example's tokenizer; for llama with Llama 3's regex, BOS token and ignore_merges."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / name, directory)
    if family != "llama":
        return
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    content["normalizer"] = None
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = LLAMA_REGEX
    content["model"]["ignore_merges"] = True
    bos = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    text = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    template = {
        "type": "TemplateProcessing",
        "single": [bos, text[0]],
        "pair": [bos, text[0], bos, text[1]],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [4093], "tokens": ["<|endoftext|>"]}},
    }
    content["post_processor"] = {"type": "Sequence", "processors": [content["post_processor"], template]}
    path.write_text(json.dumps(content), "utf-8")
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8"))
    settings.update(
        bos_token="<|endoftext|>", eos_token="<|im_end|>", add_bos_token=True, chat_template="{{ messages }}"
    )
    path.write_text(json.dumps(settings), "utf-8")
