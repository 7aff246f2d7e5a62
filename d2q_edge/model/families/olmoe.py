"""OLMoE: Llama's attention with norms of q and k over their whole width, and experts in every block."""

from __future__ import annotations

from d2q_edge.errors import D2QError
from d2q_edge.model.families.experts import MixtureOfExperts


class Olmoe(MixtureOfExperts):
    """OlmoeForCausalLM."""

    architectures = ("OlmoeForCausalLM",)
    model_type = "olmoe"
    gguf_arch = "olmoe"
    default_norm_eps = 1e-5

    @property
    def renormalizes(self) -> bool:
        return False

    def block_norms(self) -> dict[str, int]:
        return {
            **super().block_norms(),
            "self_attn.q_norm": self.hidden_size,
            "self_attn.k_norm": self.hidden_size,
        }

    def _writes_head_dim(self) -> bool:
        return self.config.get("head_dim") is not None

    def _refuse_unsupported(self) -> None:
        super()._refuse_unsupported()
        if self.config.get("clip_qkv") is not None:
            raise D2QError("config.json: clip_qkv is set, but llama.cpp's olmoe doesn't clip q, k and v")
        if self.num_heads * self.head_dim != self.hidden_size or self.num_kv_heads != self.num_heads:
            raise D2QError(
                "config.json: llama.cpp's olmoe needs queries, keys and values as wide as hidden_size "
                f"({self.hidden_size}), but the model has {self.num_heads} query heads and {self.num_kv_heads} "
                f"key-value heads of {self.head_dim}"
            )
        self._refuse_flags(("tie_word_embeddings",), "llama.cpp's olmoe needs a head of its own")
