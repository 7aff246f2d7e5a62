"""Write tiny random models of every family and its variants, built and saved by transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.checkpoints import EXAMPLE
from tests.model.tokenizer.families import FAMILIES as TOKENIZERS
from tests.model.tokenizer.families import write_gemma4

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "vocab_size": 4096,
    "bos_token_id": 4093,
    "eos_token_id": 4095,
    "pad_token_id": 4093,
}
"""All widths are multiples of 64, our smallest block; the vocabulary is that of the example's tokenizer."""
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MINISTRAL_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
GEMMA3: dict[str, Any] = {
    "model_type": "gemma3_text",
    "num_hidden_layers": 7,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 64,
    "tie_word_embeddings": True,
}
GEMMA4: dict[str, Any] = {
    "model_type": "gemma4_text",
    "vocab_size_per_layer_input": 4096,
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LFM2 = {
    "model_type": "lfm2",
    "num_hidden_layers": 4,
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    "intermediate_size": 288,
    "block_multiple_of": 64,
    "norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
QWEN35: dict[str, Any] = {
    "model_type": "qwen3_5_text",
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
    "full_attention_interval": 2,
    "head_dim": 32,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 500.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
GRANITE_HYBRID: dict[str, Any] = {
    "model_type": "granitemoehybrid",
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
    "attention_multiplier": 0.4,
    "embedding_multiplier": 2.0,
    "logits_scaling": 4.0,
    "residual_multiplier": 0.5,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_n_heads": 4,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "position_embedding_type": "nope",
    "shared_intermediate_size": 128,
    "tie_word_embeddings": True,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 2.5],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 9.0],
}
MODELS: dict[str, dict[str, Any]] = {
    "llama2": {"model_type": "llama", "num_key_value_heads": 4},
    "llama3": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE},
    "smollm2": {
        "model_type": "llama",
        "hidden_size": 192,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 32},
    "mistral-window": {"model_type": "mistral", "sliding_window": 64},
    "ministral3": {"model_type": "ministral3", "head_dim": 32, "rope_parameters": MINISTRAL_ROPE},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 5, "tie_word_embeddings": True},
    "gemma3": GEMMA3,
    "gemma3-linear": {
        **GEMMA3,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    },
    "gemma4": {
        **GEMMA4,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 4.0,
    },
    "gemma4-e": {
        **GEMMA4,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 64,
    },
    "olmo2": {"model_type": "olmo2"},
    "olmo3": {"model_type": "olmo3", "num_hidden_layers": 5, "sliding_window": 64},
    "granite": {
        "model_type": "granite",
        "attention_multiplier": 0.4,
        "embedding_multiplier": 12.0,
        "logits_scaling": 0.5,
        "residual_multiplier": 0.5,
    },
    "ernie4_5": {
        "model_type": "ernie4_5",
        "head_dim": 32,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "lfm2": LFM2,
    "qwen3.5": QWEN35,
    "qwen3.5-equal": {**QWEN35, "linear_num_value_heads": 2, "linear_num_key_heads": 2, "tie_word_embeddings": True},
    "phi3": {"model_type": "phi3", "num_key_value_heads": 4, "sliding_window": 64},
    "phi4-mini": {
        "model_type": "phi3",
        "max_position_embeddings": 1024,
        "original_max_position_embeddings": 256,
        "rope_parameters": LONGROPE,
        "partial_rotary_factor": 0.75,
        "tie_word_embeddings": True,
    },
}
"""Changes to SIZES, by variant."""
EXPERT_MODELS: dict[str, dict[str, Any]] = {
    "qwen3moe": {
        "model_type": "qwen3_moe",
        "head_dim": 32,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "olmoe": {"model_type": "olmoe", "num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2},
    "lfm2moe": {
        **LFM2,
        "model_type": "lfm2_moe",
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "num_dense_layers": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "routed_scaling_factor": 1.0,
    },
    "granite-hybrid": GRANITE_HYBRID,
    "granite-hybrid-moe": {
        **GRANITE_HYBRID,
        "intermediate_size": 64,
        "mamba_n_groups": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
}
"""Mixture-of-Experts variants, and one of their family without experts.

The slightest numerical difference may route a token to another expert.
"""

YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
ROPE_MODELS: dict[str, dict[str, Any]] = {
    "llama-linear": {**MODELS["llama2"], "rope_parameters": LINEAR},
    "llama-yarn": {**MODELS["llama2"], "rope_parameters": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0}},
    "mistral-yarn": {**MODELS["mistral"], "rope_parameters": {**YARN, "attention_factor": 1.138629436111989}},
    "ministral3-yarn": {**MODELS["ministral3"], "rope_parameters": {**MINISTRAL_ROPE, "rope_theta": 1000.0}},
    "qwen2-yarn": {**MODELS["qwen2"], "rope_parameters": YARN},
    "qwen3-yarn": {**MODELS["qwen3"], "rope_parameters": YARN},
    "smollm3-linear": {**MODELS["smollm3"], "rope_parameters": LINEAR},
    "smollm3-yarn": {**MODELS["smollm3"], "rope_parameters": YARN},
    "granite-yarn": {**MODELS["granite"], "rope_parameters": YARN},
    "olmo2-yarn": {**MODELS["olmo2"], "rope_parameters": YARN},
    "olmo3-yarn": {
        **MODELS["olmo3"],
        "rope_parameters": {
            "full_attention": {**YARN, "factor": 8.0, "attention_factor": 1.2079441541679836},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    },
    "qwen3moe-yarn": {**EXPERT_MODELS["qwen3moe"], "rope_parameters": YARN},
    "olmoe-yarn": {**EXPERT_MODELS["olmoe"], "rope_parameters": YARN},
}
"""Variants with scaled rotary embeddings."""


def write_model(directory: Path, name: str, *, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """Save a variant with a tokenizer and seeded random weights, large enough for attention to be concentrated."""
    settings = {**SIZES, **(MODELS | EXPERT_MODELS | ROPE_MODELS)[name], **changes}
    if "layer_types" in settings:
        settings["layer_types"] = settings["layer_types"][: settings["num_hidden_layers"]]
    config = AutoConfig.for_model(**settings)
    model = AutoModelForCausalLM.from_config(config)
    gemma = config.model_type == "gemma3_text"
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        scalars = {name: buffer for name, buffer in model.named_buffers() if name.endswith("layer_scalar")}
        for parameter_name, parameter in [*model.named_parameters(), *scalars.items()]:
            values = torch.randn(parameter.shape, generator=generator)
            if "norm" in parameter_name:
                # Some norms add the one themselves.
                own = gemma or (config.model_type == "qwen3_5_text" and "linear_attn" not in parameter_name)
                parameter.copy_((0 if own else 1) + 0.3 * values)
                if config.model_type == "gemma4_text" and "q_norm" in parameter_name:
                    # In place of a scale of the scores.
                    parameter.div_(4)
                if gemma and parameter_name == "model.norm.weight":
                    parameter.add_(7)
            elif gemma and "embed" in parameter_name:
                # Multiplied by eight before the first block, and by the final norm's seven and one before the head.
                parameter.copy_(values / 16)
            elif parameter_name in scalars:
                parameter.copy_(0.8 + 0.1 * values)
            elif config.model_type == "gemma4_text" and "embed" in parameter_name:
                # Multiplied by eight.
                parameter.copy_(values / 8)
            elif parameter.dim() == 1 or "embed" in parameter_name:
                parameter.copy_(0.5 * values)
            else:
                parameter.copy_(1.5 * values / parameter.shape[1] ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    model.to(dtype).save_pretrained(directory)
    if type(config)().tie_word_embeddings == config.tie_word_embeddings:
        # What is the default needn't be in the file; Gemma's on the hub don't have it.
        path = directory / "config.json"
        entries = json.loads(path.read_text())
        del entries["tie_word_embeddings"]
        path.write_text(json.dumps(entries))
    if config.model_type == "granitemoehybrid":
        # Named as in published files, which llama.cpp's converter looks for.
        path = directory / "config.json"
        entries = json.loads(path.read_text())
        names = {"linear_attention": "mamba", "full_attention": "attention"}
        entries["layer_types"] = [names[kind] for kind in entries["layer_types"]]
        path.write_text(json.dumps(entries))
    source = EXAMPLE
    if config.model_type == "ernie4_5":
        # llama.cpp's converter knows this architecture with a SentencePiece tokenizer only.
        source = TOKENIZERS["llama2"].write(directory.parent / "tokenizer")
    if config.model_type == "gemma4_text":
        source = write_gemma4(directory.parent / "tokenizer", config.vocab_size)
    for file in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        if (source / file).exists():
            shutil.copy(source / file, directory)
    if config.model_type == "phi3":
        # llama.cpp's converter looks for a tokenizer.model unless the class is this one, Phi-4's.
        path = directory / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "GPT2Tokenizer"}))
    return directory
