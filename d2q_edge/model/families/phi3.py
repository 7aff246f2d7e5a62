"""Phi-3, Phi-3.5 and Phi-4-mini: fused q, k, v and fused gate, up; partial rotary embedding; LongRoPE.

llama.cpp: src/models/phi3.cpp; conversion/phi.py, Phi3MiniModel. It ignores the sliding window, and `notes` says so.
LongRoPE's factors for short and long contexts become tensors of the file; llama.cpp chooses between them by the context
size that it is started with, transformers by the length of the text.
"""

import math
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from d2q_edge.errors import D2QError
from d2q_edge.model.families.base import Family
from d2q_edge.model.families.gguf_keys import GGUFKeys
from d2q_edge.model.families.layout import LinearGroup
from d2q_edge.model.families.settings import positive_float


class Phi3(Family):
    """Phi3ForCausalLM."""

    architectures = ("Phi3ForCausalLM",)
    model_type = "phi3"
    gguf_arch = "phi3"
    rope_types = ("default", "longrope", "su")
    refused_flags = ("attention_bias", "mlp_bias", "lm_head_bias")
    full_width_heads = True
    default_norm_eps = 1e-5

    linear_groups = (
        LinearGroup("input_layernorm", ("self_attn.qkv_proj",)),
        LinearGroup(None, ("self_attn.o_proj",), absorber="self_attn.qkv_proj"),
        LinearGroup("post_attention_layernorm", ("mlp.gate_up_proj",)),
        LinearGroup(None, ("mlp.down_proj",), absorber="mlp.gate_up_proj"),
    )

    def linear_shape(self, index: int, linear: str) -> tuple[int, int]:
        if linear == "self_attn.qkv_proj":
            return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim, self.hidden_size
        if linear == "mlp.gate_up_proj":
            return 2 * self.intermediate_size, self.hidden_size
        return super().linear_shape(index, linear)

    def absorber_rows(self, index: int, absorber: str) -> npt.NDArray[np.int64]:
        """Return rows of v, which follow those of q and k; or rows of up, which follow those of gate."""
        if absorber == "self_attn.qkv_proj":
            before = (self.num_heads + self.num_kv_heads) * self.head_dim
            return before + super().absorber_rows(index, "self_attn.v_proj")
        return self.intermediate_size + np.arange(self.intermediate_size)

    def extra_tensors(self) -> dict[str, npt.NDArray[np.float32]]:
        if self.rope_type == "default":
            return {}
        return {f"rope_factors_{kind}.weight": self._factors(kind) for kind in ("long", "short")}

    def add_metadata(self, writer: gguf.GGUFWriter, file_type: int) -> None:
        writer.add_context_length(self.context_length)
        writer.add_rope_scaling_orig_ctx_len(self.original_context)
        writer.add_embedding_length(self.hidden_size)
        writer.add_feed_forward_length(self.intermediate_size)
        writer.add_block_count(self.num_layers)
        writer.add_head_count(self.num_heads)
        writer.add_head_count_kv(self.num_kv_heads)
        writer.add_layer_norm_rms_eps(self.norm_eps)
        writer.add_rope_dimension_count(self.rotary_dim)
        writer.add_rope_freq_base(self.rope_theta)
        writer.add_file_type(file_type)
        writer.add_sliding_window(self.ignored_window or 0)
        if self.rope_type != "default":
            writer.add_rope_scaling_attn_factors(_attention_factor(self.context_length, self.original_context))

    @classmethod
    def import_config(cls, keys: GGUFKeys) -> dict[str, Any]:
        config = super().import_config(keys)
        original = keys.whole("rope.scaling.original_context_length", config["max_position_embeddings"])
        config["original_max_position_embeddings"] = original
        config["sliding_window"] = keys.whole("attention.sliding_window", 0) or None
        rope, short = config["rope_parameters"], keys.factors("rope_factors_short.weight")
        if short is not None and rope["rope_type"] in ("default", "longrope"):
            rope |= {"rope_type": "longrope", "short_factor": short, "original_max_position_embeddings": original}
            rope["long_factor"] = keys.factors("rope_factors_long.weight")
            rope.pop("factor", None)
            given = keys.decimal("rope.scaling.attn_factor", 1.0)
            own = _attention_factor(config["max_position_embeddings"], original)
            if not math.isclose(given, own, rel_tol=1e-6):
                rope["attention_factor"] = given
        return config

    def _read_rope(self) -> None:
        super()._read_rope()
        original = self.rope_scaling.get("original_max_position_embeddings")
        if original is None:
            original = self.config.get("original_max_position_embeddings", 4096)
        if type(original) is not int or original < 2:
            raise D2QError(
                f"config.json: original_max_position_embeddings must be a whole number from 2, not {original!r}"
            )
        self.original_context = original

    def _read_rotary_share(self, settings: Mapping[str, Any]) -> None:
        share = settings.get("partial_rotary_factor", self.config.get("partial_rotary_factor"))
        share = positive_float("partial_rotary_factor", 1.0 if share is None else share)
        self.rotary_dim = int(self.head_dim * share)
        # llama.cpp's converter rounds differently.
        if self.rotary_dim % 2 or not 0 < self.rotary_dim == int(share * self.hidden_size) // self.num_heads:
            raise D2QError(f"config.json: a partial_rotary_factor of {share:g} doesn't suit heads of {self.head_dim}")
        if self.rotary_dim > self.head_dim:
            raise D2QError(f"config.json: partial_rotary_factor must be at most 1, not {share:g}")

    def _refuse_unsupported(self) -> None:
        super()._refuse_unsupported()
        if self.rope_type == "default":
            return
        self.extra_tensors()
        # transformers takes these factors from the config, but the file can't express them.
        scale = self.context_length / self.original_context
        for key, computed in (
            ("factor", scale),
            ("attention_factor", _attention_factor(self.context_length, self.original_context)),
        ):
            given = self.rope_scaling.get(key)
            if given is not None and not math.isclose(positive_float(f"rope_scaling's {key}", given), computed):
                raise D2QError(
                    f"config.json: rope_scaling's {key} is {given:g}, but llama.cpp computes with {computed:g}, from "
                    "max_position_embeddings and original_max_position_embeddings"
                )

    def _check_attention(self) -> None:
        super()._check_attention()
        if self.config.get("sliding_window") is not None:
            self.ignored_window = self._int("sliding_window")

    def _factors(self, kind: str) -> npt.NDArray[np.float32]:
        values = self.rope_scaling.get(f"{kind}_factor")
        if not isinstance(values, list) or len(values) != self.rotary_dim // 2:
            raise D2QError(
                f"config.json: rope_scaling's {kind}_factor must have {self.rotary_dim // 2} numbers, half of the "
                "dimensions that are rotated"
            )
        return np.array([positive_float(f"rope_scaling's {kind}_factor", value) for value in values], np.float32)


def _attention_factor(context: int, original: int) -> float:
    """Return what llama.cpp's converter writes (LongRoPE, arXiv 2402.13753, section 4.2)."""
    scale = context / max(original, 1)
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 and original > 1 else 1.0
