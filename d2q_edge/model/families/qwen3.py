"""Qwen3 (dense): Llama's block with a norm per head on q and k, and no biases (llama.cpp's src/models/qwen3.cpp)."""

from __future__ import annotations

from d2q_edge.model.families.base import Family


class Qwen3(Family):
    """Qwen3ForCausalLM."""

    architectures = ("Qwen3ForCausalLM",)
    model_type = "qwen3"
    gguf_arch = "qwen3"
    default_kv_heads = 32

    def block_norms(self) -> dict[str, int]:
        return {
            **super().block_norms(),
            "self_attn.q_norm": self.head_dim,
            "self_attn.k_norm": self.head_dim,
        }

    def _default_head_dim(self) -> int | None:
        # transformers' Qwen3Config has this default whatever the width.
        return 128

    def _refuse_unsupported(self) -> None:
        super()._refuse_unsupported()
        self._refuse_flags(("attention_bias",), "llama.cpp's qwen3 has no bias on the output layer")
