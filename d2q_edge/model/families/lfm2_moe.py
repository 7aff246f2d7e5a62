"""LFM2-MoE (8B-A1B): LFM2's blocks, whose feed-forward layers are experts in all but the first few.

llama.cpp: src/models/lfm2moe.cpp; conversion/lfm2.py, LFM2MoeModel. The router's outputs pass a sigmoid. A bias for
each expert counts in the choice of experts, but not in their weights; it and the router stay f32.
"""

from typing import Any

import gguf

from d2q_edge.errors import D2QError
from d2q_edge.model.families.base import Family
from d2q_edge.model.families.experts import MixtureOfExperts
from d2q_edge.model.families.gguf_keys import GGUFKeys
from d2q_edge.model.families.layout import RoutedExperts
from d2q_edge.model.families.lfm2 import Lfm2

MODULE = "feed_forward"
BIAS = f"{MODULE}.expert_bias"


class Lfm2Moe(MixtureOfExperts, Lfm2):
    """Lfm2MoeForCausalLM."""

    architectures = ("Lfm2MoeForCausalLM",)
    model_type = "lfm2_moe"
    gguf_arch = "lfm2moe"
    refused_flags = ("conv_bias",)
    normalizes_top_k = True
    normalizes_by_default = True
    expert_width_key = "moe_intermediate_size"
    rotary = "pos_emb"
    expert_parts = ("w1", "w3", "w2")
    stacked_parts = ("w1", "w2", "w3")

    def block_experts(self, index: int) -> RoutedExperts | None:
        if index < self.dense_blocks:
            return None
        return RoutedExperts(MODULE, f"{MODULE}.gate", "ffn_norm", self.num_experts, self.expert_parts)

    def block_constants(self, index: int) -> dict[str, tuple[int, ...]]:
        bias = {BIAS: (self.num_experts,)} if self.block_experts(index) else {}
        return super().block_constants(index) | bias

    def gguf_name(self, hf_name: str) -> str:
        # llama.cpp's converter renames both before it looks them up.
        if ".experts." in hf_name:
            return super().gguf_name(hf_name.removeprefix("model."))
        return super().gguf_name(f"{hf_name}.bias" if hf_name.endswith(BIAS) else hf_name)

    def add_metadata(self, writer: gguf.GGUFWriter, file_type: int) -> None:
        Family.add_metadata(self, writer, file_type)
        writer.add_expert_feed_forward_length(self.expert_width)
        writer.add_leading_dense_block_count(self.dense_blocks)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_vocab_size(self.vocab_size)
        writer.add_shortconv_l_cache(self.taps)

    @classmethod
    def import_config(cls, keys: GGUFKeys) -> dict[str, Any]:
        if keys.whole("expert_gating_func") != gguf.ExpertGatingFuncType.SIGMOID:
            raise D2QError(f"{keys.file.path} can't be converted: its experts aren't chosen by a sigmoid")
        return super().import_config(keys) | {
            cls.expert_width_key: keys.whole("expert_feed_forward_length"),
            "num_dense_layers": keys.whole("leading_dense_block_count", 0),
        }

    def _feed_forward_width(self) -> int:
        return self._int("intermediate_size")

    def _refuse_unsupported(self) -> None:
        super()._refuse_unsupported()
        self.dense_blocks = 0
        if self.config.get("num_dense_layers") != 0:
            self.dense_blocks = self._int("num_dense_layers", default=2, maximum=self.num_layers - 1)
        if not self._flag("use_expert_bias", default=True):
            raise D2QError("config.json: use_expert_bias is false, but llama.cpp's lfm2moe always has such a bias")
        if self._float("routed_scaling_factor", default=1.0) != 1:
            raise D2QError("config.json: routed_scaling_factor isn't 1, the only one that llama.cpp's lfm2moe has")
