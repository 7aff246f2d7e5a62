"""Qwen3 with a mixture of experts (30B-A3B, 235B-A22B): Qwen3's attention, and experts in every block."""

from __future__ import annotations

import gguf

from d2q_edge.errors import D2QError
from d2q_edge.model.families.experts import MixtureOfExperts


class Qwen3Moe(MixtureOfExperts):
    """Qwen3MoeForCausalLM."""

    architectures = ("Qwen3MoeForCausalLM",)
    model_type = "qwen3_moe"
    gguf_arch = "qwen3moe"
    default_kv_heads = 4

    @property
    def renormalizes(self) -> bool:
        return True

    def block_norms(self) -> dict[str, int]:
        return {
            **super().block_norms(),
            "self_attn.q_norm": self.head_dim,
            "self_attn.k_norm": self.head_dim,
        }

    def add_metadata(self, writer: gguf.GGUFWriter, file_type: int) -> None:
        super().add_metadata(writer, file_type)
        writer.add_expert_feed_forward_length(self.expert_width)

    def _writes_head_dim(self) -> bool:
        return self.config.get("head_dim") is not None

    def _read_expert_width(self) -> int:
        return self._int("moe_intermediate_size")

    def _refuse_unsupported(self) -> None:
        super()._refuse_unsupported()
        if self.config.get("mlp_only_layers") or self.config.get("decoder_sparse_step") not in (None, 1):
            raise D2QError(
                "config.json: mlp_only_layers or decoder_sparse_step make some blocks dense, but llama.cpp's qwen3moe "
                "has experts in every block"
            )
