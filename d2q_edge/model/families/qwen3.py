"""Qwen3 (dense): Llama's block with a norm per head on q and k, and without biases.

llama.cpp: src/models/qwen3.cpp; conversion/qwen.py, Qwen3Model.
"""

from d2q_edge.model.families.base import Family


class Qwen3(Family):
    """Qwen3ForCausalLM."""

    architectures = ("Qwen3ForCausalLM",)
    model_type = "qwen3"
    gguf_arch = "qwen3"
    qk_norms = True
    refused_flags = ("attention_bias",)
    default_kv_heads = 32
    default_head_dim = 128
