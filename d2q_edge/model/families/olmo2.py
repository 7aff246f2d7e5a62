"""OLMo 2 and Olmo 3: norms after the sublayers instead of in front of them, norms over the whole width of q and k; in
Olmo 3 three layers of four have a sliding window.

llama.cpp: src/models/olmo2.cpp; conversion/olmo.py, Olmo2Model. Layers with a sliding window have the rotary base of
the others and no scaling.

q, k, v and gate, up read the residual stream itself: nothing in front of them can absorb column scales, and there is no
norm to correct. The scales of o and down are absorbed by the rows of v and up. The norms after o and down have weights,
so that the residual stream can't be rotated.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import gguf

from d2q_edge.errors import D2QError
from d2q_edge.model.families.base import Family
from d2q_edge.model.families.gguf_keys import GGUFKeys
from d2q_edge.model.families.layout import LinearGroup, Sublayer

FULL_INTERVAL = 4  # every fourth layer of Olmo 3 attends to all tokens, unless config.json says otherwise
LAYER_TYPES = {"sliding_attention": True, "full_attention": False}


class Olmo2(Family):
    """Olmo2ForCausalLM."""

    architectures = ("Olmo2ForCausalLM",)
    model_type = "olmo2"
    gguf_arch = "olmo2"
    records_default_head_dim = False
    can_rotate = False
    refused_flags = ("attention_bias", "tie_word_embeddings")
    full_width_heads = True
    default_norm_eps = 1e-5

    sublayers = (
        Sublayer("self_attn", None, "post_attention_layernorm"),
        Sublayer("mlp", None, "post_feedforward_layernorm"),
    )
    linear_groups = (
        LinearGroup(None, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), reads_stream=True),
        LinearGroup(None, ("self_attn.o_proj",), absorber="self_attn.v_proj"),
        LinearGroup(None, ("mlp.gate_proj", "mlp.up_proj"), reads_stream=True),
        LinearGroup(None, ("mlp.down_proj",), absorber="mlp.up_proj"),
    )

    def block_norms(self, index: int) -> dict[str, int]:
        heads = {"q": self.num_heads, "k": self.num_kv_heads}
        whole = {f"self_attn.{name}_norm": count * self.head_dim for name, count in heads.items()}
        return super().block_norms(index) | whole

    @classmethod
    def import_config(cls, keys: GGUFKeys) -> dict[str, Any]:
        """Return Olmo 3's config.json for a file with a sliding window."""
        config = super().import_config(keys)
        if (window := keys.whole("attention.sliding_window", 0)) == 0:
            return config
        pattern = keys.value("attention.sliding_window_pattern", FULL_INTERVAL)
        layers = range(config["num_hidden_layers"])
        slides = pattern if isinstance(pattern, list) else [(index + 1) % FULL_INTERVAL != 0 for index in layers]
        full = config["rope_parameters"]
        return config | {
            "architectures": [Olmo3.architectures[0]],
            "model_type": Olmo3.model_type,
            "sliding_window": window,
            "layer_types": ["sliding_attention" if each else "full_attention" for each in slides],
            "rope_parameters": {
                "full_attention": full,
                "sliding_attention": {"rope_type": "default", "rope_theta": full["rope_theta"]},
            },
        }


class Olmo3(Olmo2):
    """Olmo3ForCausalLM."""

    architectures = ("Olmo3ForCausalLM",)
    model_type = "olmo3"
    default_rope_theta = 500000.0

    def sliding_window(self, index: int) -> int | None:
        return self.window if self.slides[index] else None

    def add_metadata(self, writer: gguf.GGUFWriter, file_type: int) -> None:
        super().add_metadata(writer, file_type)
        writer.add_sliding_window(self.window)
        writer.add_sliding_window_pattern(self.slides)

    def _add_rope(self, writer: gguf.GGUFWriter) -> None:
        super()._add_rope(writer)
        if self.config.get("rope_parameters"):
            # The converter repeats what config.json has, though llama.cpp computes with the other base.
            writer.add_rope_freq_base_swa(self.rope_theta)

    def _rope_settings(self) -> Mapping[str, Any]:
        full, sliding = self._ropes_by_type()
        theta = full.get("rope_theta", self.config.get("rope_theta")) or self.default_rope_theta
        if sliding.get("rope_theta", self.default_rope_theta) != theta:
            raise D2QError(
                "config.json: layers with a sliding window have another rope_theta than those without, but llama.cpp's "
                f"{self.gguf_arch} computes with one"
            )
        return full

    def _check_attention(self) -> None:
        self.window = self._int("sliding_window", default=4096)
        types = self.config.get("layer_types")
        if types is None:
            names = ("sliding_attention", "full_attention")
            types = [names[(index + 1) % FULL_INTERVAL == 0] for index in range(self.num_layers)]
        known = isinstance(types, Iterable) and all(isinstance(kind, str) and kind in LAYER_TYPES for kind in types)
        if not known or len(types) != self.num_layers:
            raise D2QError(
                f"config.json: layer_types must name the attention of all {self.num_layers} layers, each one of "
                f"{', '.join(LAYER_TYPES)}"
            )
        self.slides = [LAYER_TYPES[kind] for kind in types]
