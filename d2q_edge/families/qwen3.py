"""Qwen3 (dense): Llama's block with a norm per head on q and k, and no biases."""

from __future__ import annotations

from d2q_edge.errors import D2QError
from d2q_edge.families.base import Family


class Qwen3(Family):
    """Qwen3ForCausalLM."""

    architectures = ("Qwen3ForCausalLM",)
    gguf_arch = "qwen3"

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
        if self._flag("attention_bias"):
            raise D2QError("config.json: attention_bias is set, but llama.cpp's qwen3 has no bias on the output layer")
