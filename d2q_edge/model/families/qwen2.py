"""Qwen2 and Qwen2.5: Llama's block with biases on q, k and v (llama.cpp's src/models/qwen2.cpp)."""

from __future__ import annotations

from d2q_edge.errors import D2QError
from d2q_edge.model.families.base import Family


class Qwen2(Family):
    """Qwen2ForCausalLM."""

    architectures = ("Qwen2ForCausalLM",)
    model_type = "qwen2"
    gguf_arch = "qwen2"
    default_kv_heads = 32

    def biased_linears(self) -> tuple[str, ...]:
        return ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

    def _writes_head_dim(self) -> bool:
        return self.config.get("head_dim") is not None

    def _refuse_unsupported(self) -> None:
        super()._refuse_unsupported()
        if self.num_heads * self.head_dim != self.hidden_size:
            raise D2QError(
                f"config.json: a Qwen2 model needs num_attention_heads * head_dim = hidden_size, but it has "
                f"{self.num_heads} * {self.head_dim} and {self.hidden_size}"
            )
