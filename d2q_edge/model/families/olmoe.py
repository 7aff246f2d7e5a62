"""OLMoE (1B-7B): Llama's attention with norms over the whole width of q and k, and experts in every block.

llama.cpp: src/models/olmoe.cpp; conversion/olmo.py, OlmoeModel.
"""

from d2q_edge.errors import D2QError
from d2q_edge.model.families.experts import MixtureOfExperts


class Olmoe(MixtureOfExperts):
    """OlmoeForCausalLM."""

    architectures = ("OlmoeForCausalLM",)
    model_type = "olmoe"
    gguf_arch = "olmoe"
    records_default_head_dim = False
    refused_flags = ("attention_bias", "tie_word_embeddings")
    default_norm_eps = 1e-5
    normalizes_top_k = False

    def block_norms(self, index: int) -> dict[str, int]:
        return super().block_norms(index) | dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), self.hidden_size)

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
