"""Gemma 3, text only: norms on both sides of every sublayer that multiply by 1 + weight, scaled embeddings, and five
sliding-window layers with their own rotary base to one layer with full attention.

llama.cpp: src/models/gemma3.cpp; conversion/gemma.py, Gemma3Model. The pattern of six layers is built into llama.cpp,
and so is the attention scale, 1 / sqrt(head_dim) but for one number of layers. The file's norm weights include the 1.

Column scales are absorbed by input_layernorm, pre_feedforward_layernorm and the rows of v and up. The norms after o and
down stay as they are; their weights lie between these layers and the residual stream, which therefore can't be rotated.
"""

import math
from collections.abc import Mapping
from typing import Any

import gguf

from d2q_edge.errors import D2QError
from d2q_edge.model.families.base import Family
from d2q_edge.model.families.gguf_keys import GGUFKeys
from d2q_edge.model.families.layout import LinearGroup, Sublayer
from d2q_edge.model.families.settings import positive_float

FULL_INTERVAL = 6  # every sixth layer attends to all tokens: llama.cpp's default for this architecture
WIDE_LAYERS = 62  # with this many layers (27B) llama.cpp scales attention by hidden_size / heads instead of head_dim


class Gemma3(Family):
    """Gemma3ForCausalLM."""

    architectures = ("Gemma3ForCausalLM",)
    model_type = "gemma3_text"
    gguf_arch = "gemma3"
    rope_types = ("default", "linear")
    activation = ("hidden_activation", "gelu_pytorch_tanh")
    norm_offset = 1.0
    qk_norms = True
    can_rotate = False
    refused_flags = ("attention_bias", "use_bidirectional_attention")
    default_rope_theta = 1000000.0
    default_kv_heads = 4
    default_head_dim = 256
    tied_by_default = True

    sublayers = (
        Sublayer("self_attn", "input_layernorm", "post_attention_layernorm"),
        Sublayer("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    )
    linear_groups = (
        LinearGroup("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        LinearGroup(None, ("self_attn.o_proj",), absorber="self_attn.v_proj"),
        LinearGroup("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        LinearGroup(None, ("mlp.down_proj",), absorber="mlp.up_proj"),
    )

    def sliding_window(self, index: int) -> int | None:
        return self.window if (index + 1) % FULL_INTERVAL else None

    def add_metadata(self, writer: gguf.GGUFWriter, file_type: int) -> None:
        super().add_metadata(writer, file_type)
        writer.add_sliding_window(self.window)

    @classmethod
    def import_config(cls, keys: GGUFKeys) -> dict[str, Any]:
        config = super().import_config(keys)
        sliding = {"rope_type": "default", "rope_theta": keys.decimal("rope.freq_base_swa", 10000.0)}
        config["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": sliding}
        config["sliding_window"] = keys.whole("attention.sliding_window")
        if isinstance(pattern := keys.value("attention.sliding_window_pattern", FULL_INTERVAL), list):
            config["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in pattern]
        elif pattern != FULL_INTERVAL:
            config["sliding_window_pattern"] = pattern
        wide = config["num_hidden_layers"] == WIDE_LAYERS
        heads = max(config["num_attention_heads"], 1)
        config["query_pre_attn_scalar"] = config["hidden_size"] // heads if wide else config["head_dim"]
        config["final_logit_softcapping"] = keys.decimal("final_logit_softcapping", 0.0) or None
        return config

    def _add_rope(self, writer: gguf.GGUFWriter) -> None:
        super()._add_rope(writer)
        writer.add_rope_freq_base_swa(self.sliding_rope_theta)

    def _rope_settings(self) -> Mapping[str, Any]:
        """Return the settings of the full-attention layers; also read the sliding-window layers' rotary base."""
        full, sliding = self._ropes_by_type()
        theta = sliding.get("rope_theta", self.config.get("rope_local_base_freq"))
        self.sliding_rope_theta = positive_float("rope_local_base_freq", 10000.0 if theta is None else theta)
        return full

    def _check_attention(self) -> None:
        config = self.config
        # Not rounded to bfloat16: as llama.cpp, and transformers in float32.
        self.embedding_scale = math.sqrt(self.hidden_size)
        self.window = self._int("sliding_window", default=4096)
        interval = self._int("sliding_window_pattern", default=FULL_INTERVAL)
        numbers = range(1, self.num_layers + 1)
        types = config.get("layer_types")
        if types is None:
            types = ["sliding_attention" if number % interval else "full_attention" for number in numbers]
        if types != ["sliding_attention" if number % FULL_INTERVAL else "full_attention" for number in numbers]:
            raise D2QError(
                f"config.json: layer_types must make every {FULL_INTERVAL}th layer and no other attend to all tokens; "
                "llama.cpp's gemma3 expects that"
            )
        for key in ("final_logit_softcapping", "attn_logit_softcapping"):
            if config.get(key) is not None:
                raise D2QError(f"config.json: {key} is set, which isn't supported")
        scalar = positive_float("query_pre_attn_scalar", config.get("query_pre_attn_scalar", 256))
        expected = self.hidden_size // self.num_heads if self.num_layers == WIDE_LAYERS else self.head_dim
        if scalar != expected:
            raise D2QError(
                f"config.json: query_pre_attn_scalar is {scalar:g}, but llama.cpp's gemma3 computes with {expected} "
                f"in a model of {self.num_layers} layers with {self.num_heads} heads"
            )
