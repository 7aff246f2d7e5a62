"""Qwen3 Mixture of Experts (30B-A3B, 235B-A22B): Qwen3's attention, and experts in every block.

llama.cpp: src/models/qwen3moe.cpp; conversion/qwen.py, Qwen3MoeModel.
"""

from typing import Any

import gguf

from d2q_edge.errors import D2QError
from d2q_edge.model.families.experts import MixtureOfExperts
from d2q_edge.model.families.gguf_keys import GGUFKeys


class Qwen3Moe(MixtureOfExperts):
    """Qwen3MoeForCausalLM."""

    architectures = ("Qwen3MoeForCausalLM",)
    model_type = "qwen3_moe"
    gguf_arch = "qwen3moe"
    records_default_head_dim = False
    qk_norms = True
    default_kv_heads = 4
    normalizes_top_k = True
    expert_width_key = "moe_intermediate_size"

    def add_metadata(self, writer: gguf.GGUFWriter, file_type: int) -> None:
        super().add_metadata(writer, file_type)
        writer.add_expert_feed_forward_length(self.expert_width)

    @classmethod
    def import_config(cls, keys: GGUFKeys) -> dict[str, Any]:
        return super().import_config(keys) | {cls.expert_width_key: keys.whole("expert_feed_forward_length")}

    def _refuse_unsupported(self) -> None:
        super()._refuse_unsupported()
        if self.config.get("mlp_only_layers") or self.config.get("decoder_sparse_step") not in (None, 1):
            raise D2QError(
                "config.json: mlp_only_layers or decoder_sparse_step make some blocks dense, but llama.cpp's qwen3moe "
                "has experts in every block"
            )
