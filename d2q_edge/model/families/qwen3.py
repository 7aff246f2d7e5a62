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
    default_kv_heads = 32

    def _default_head_dim(self) -> int | None:
        # The default of transformers' Qwen3Config, whatever the width.
        return 128

    def _refuse_unsupported(self) -> None:
        super()._refuse_unsupported()
        self._refuse_flags(("attention_bias",), "llama.cpp's qwen3 has no bias on the output layer")
