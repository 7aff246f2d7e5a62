"""Qwen2 and Qwen2.5: Llama's block with biases on q, k and v.

llama.cpp: src/models/qwen2.cpp; conversion/qwen.py, Qwen2Model.
"""

from d2q_edge.model.families.base import Family


class Qwen2(Family):
    """Qwen2ForCausalLM."""

    architectures = ("Qwen2ForCausalLM",)
    model_type = "qwen2"
    gguf_arch = "qwen2"
    records_default_head_dim = False
    full_width_heads = True
    default_kv_heads = 32

    def biased_linears(self) -> tuple[str, ...]:
        return ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
