"""Gemma 4 without experts, text only: dense models, and E2B and E4B, whose blocks have embeddings for themselves.

llama.cpp: src/models/gemma4.cpp; conversion/gemma.py, Gemma4Model. Layers with full attention have larger heads, other
rotary embeddings, of which most channels aren't rotated, and in the dense models keys that are also the values. The
last blocks of E2B and E4B compute neither keys nor values: they read those of the last block of their kind that does.

Values are normalized without weights, so that nothing can absorb column scales of o; nor is there anything for the
scales of per_layer_projection, which reads a product with the block's own embeddings.
"""

import math
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from torch import nn

from d2q_edge.errors import D2QError
from d2q_edge.model.families.base import Family
from d2q_edge.model.families.gguf_keys import GGUFKeys
from d2q_edge.model.families.layout import LinearGroup, Sublayer
from d2q_edge.model.families.settings import Settings, positive_float
from d2q_edge.model.families.side_inputs import GATE, PROJECTION, PerLayerBranch

SLIDING, FULL = "sliding_attention", "full_attention"
UNROTATED = 1e30  # by which llama.cpp divides the angles of channels that aren't rotated
PER_LAYER = (LinearGroup(None, (GATE,), reads_stream=True), LinearGroup(None, (PROJECTION,)))
MLP = (
    LinearGroup("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    LinearGroup(None, ("mlp.down_proj",), absorber="mlp.up_proj"),
)


class Gemma4(Family):
    """Gemma4ForCausalLM, the text model of Gemma4ForConditionalGeneration."""

    architectures = ("Gemma4ForCausalLM",)
    model_type = "gemma4_text"
    gguf_arch = "gemma4"
    rope_types = ("proportional",)
    activation = ("hidden_activation", "gelu_pytorch_tanh")
    can_rotate = False
    refused_flags = ("attention_bias",)
    default_rope_theta = 1000000.0
    default_kv_heads = 4
    default_head_dim = 256
    tied_by_default = True

    def block_groups(self, index: int) -> tuple[LinearGroup, ...]:
        keys = ("self_attn.k_proj",) if self._has_keys(index) else ()
        values = ("self_attn.v_proj",) if keys and not (self.keys_are_values and self._is_full(index)) else ()
        attention = LinearGroup("input_layernorm", ("self_attn.q_proj", *keys, *values))
        own = PER_LAYER if self.per_layer_width else ()
        return attention, LinearGroup(None, ("self_attn.o_proj",)), *MLP, *own

    def block_sublayers(self, index: int) -> tuple[Sublayer, ...]:
        attention = Sublayer("self_attn", "input_layernorm", "post_attention_layernorm")
        mlp = "mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"
        if not self.per_layer_width:
            return attention, Sublayer(*mlp, "layer_scalar")
        return attention, Sublayer(*mlp), Sublayer("per_layer", None, "post_per_layer_input_norm", "layer_scalar")

    def sublayer_groups(self, index: int, sublayer: Sublayer) -> tuple[LinearGroup, ...]:
        return PER_LAYER if sublayer.module == "per_layer" else super().sublayer_groups(index, sublayer)

    def block_norms(self, index: int) -> dict[str, int]:
        heads = ("self_attn.q_norm", "self_attn.k_norm") if self._has_keys(index) else ("self_attn.q_norm",)
        return super().block_norms(index) | dict.fromkeys(heads, self._head(index)[1])

    def block_constants(self, index: int) -> dict[str, tuple[int, ...]]:
        return {"layer_scalar": (1,)}

    def adapt_block(self, index: int, block: nn.Module) -> None:
        if self.per_layer_width:
            block.add_module("per_layer", PerLayerBranch(block))

    def linear_shape(self, index: int, linear: str) -> tuple[int, int]:
        kv_heads, head_dim = self._head(index)
        width = self._widths()[index]
        return {
            "self_attn.q_proj": (self.num_heads * head_dim, self.hidden_size),
            "self_attn.k_proj": (kv_heads * head_dim, self.hidden_size),
            "self_attn.v_proj": (kv_heads * head_dim, self.hidden_size),
            "self_attn.o_proj": (self.hidden_size, self.num_heads * head_dim),
            "mlp.gate_proj": (width, self.hidden_size),
            "mlp.up_proj": (width, self.hidden_size),
            "mlp.down_proj": (self.hidden_size, width),
            GATE: (self.per_layer_width, self.hidden_size),
            PROJECTION: (self.hidden_size, self.per_layer_width),
        }[linear]

    def outer_tensors(self) -> dict[str, tuple[int, ...]]:
        wide = self.num_layers * self.per_layer_width
        return (
            {
                f"{self.per_layer_table}.weight": (self.vocab_size, wide),
                f"{self.per_layer_projection}.weight": (wide, self.hidden_size),
                f"{self.per_layer_norm}.weight": (self.per_layer_width,),
            }
            if self.per_layer_width
            else {}
        )

    def sliding_window(self, index: int) -> int | None:
        return None if self._is_full(index) else self.window

    def cached_width(self, index: int) -> int:
        return 2 * math.prod(self._head(index)) if self._has_keys(index) else 0

    def gguf_name(self, hf_name: str) -> str:
        return super().gguf_name(f"{hf_name}.weight" if hf_name.endswith("layer_scalar") else hf_name)

    def extra_tensors(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return the divisors of the angles in layers with full attention."""
        half = self.full_head[1] // 2
        rotated = int(self.full_head[1] * self.rotated_share / 2)
        return {"rope_freqs.weight": np.array([1.0] * rotated + [UNROTATED] * (half - rotated), np.float32)}

    def add_metadata(self, writer: gguf.GGUFWriter, file_type: int) -> None:
        super().add_metadata(writer, file_type)
        if self.logit_cap:
            writer.add_final_logit_softcapping(self.logit_cap)
        writer.add_sliding_window(self.window)
        writer.add_shared_kv_layers(self.sharing_layers)
        writer.add_embedding_length_per_layer_input(self.per_layer_width)
        writer.add_sliding_window_pattern([kind == SLIDING for kind in self.layer_types])
        writer.add_key_length_swa(self.head_dim)
        writer.add_value_length_swa(self.head_dim)
        writer.add_rope_dimension_count(self.full_head[1])
        writer.add_rope_dimension_count_swa(self.head_dim)

    @classmethod
    def import_config(cls, keys: GGUFKeys) -> dict[str, Any]:
        slides = keys.value("attention.sliding_window_pattern", None)
        pattern = [bool(each) for each in slides] if isinstance(slides, list) else []
        kinds = [SLIDING if each else FULL for each in pattern]
        heads, widths = keys.value("attention.head_count_kv", None), keys.value("feed_forward_length", None)
        by_kind = dict(zip(reversed(kinds), reversed(heads), strict=False)) if isinstance(heads, list) else {}
        head_dim = keys.whole("attention.key_length_swa")
        sliding = {"attention.head_count_kv": by_kind.get(SLIDING, heads), "attention.key_length": head_dim}
        sliding |= {
            "attention.value_length": keys.whole("attention.value_length_swa"),
            "rope.dimension_count": head_dim,
        }
        narrow = {"feed_forward_length": widths[0]} if isinstance(widths, list) and widths else {}
        config = super().import_config(keys.replaced({**sliding, **narrow}))
        factors = keys.factors("rope_freqs.weight") or [1.0]
        share = sum(factor == 1 for factor in factors) / len(factors)
        full = {
            "rope_type": "proportional",
            "partial_rotary_factor": share,
            "rope_theta": keys.decimal("rope.freq_base"),
        }
        theta = keys.decimal("rope.freq_base_swa", 10000.0)
        first_full = kinds.index(FULL) if FULL in kinds else 0
        return config | {
            "rope_parameters": {FULL: full, SLIDING: {"rope_type": "default", "rope_theta": theta}},
            "layer_types": kinds,
            "sliding_window": keys.whole("attention.sliding_window"),
            "global_head_dim": keys.whole("attention.key_length"),
            "num_global_key_value_heads": by_kind.get(FULL, heads),
            "attention_k_eq_v": f"blk.{first_full}.attn_v.weight" not in keys.file.tensors,
            "num_kv_shared_layers": keys.whole("attention.shared_kv_layers", 0),
            "hidden_size_per_layer_input": keys.whole("embedding_length_per_layer_input"),
            "vocab_size_per_layer_input": config["vocab_size"],
            "use_double_wide_mlp": bool(narrow),
            "final_logit_softcapping": keys.decimal("final_logit_softcapping", 0.0) or None,
        }

    def _add_rope(self, writer: gguf.GGUFWriter) -> None:
        super()._add_rope(writer)
        writer.add_rope_freq_base_swa(self.sliding_rope_theta)

    def _rope_settings(self) -> Mapping[str, Any]:
        """Return the settings of layers with full attention; also read the sliding-window layers' rotary base."""
        full, sliding = self._ropes_by_type()
        self.sliding_rope_theta = positive_float("rope_theta", sliding.get("rope_theta", 10000.0))
        return (
            full if self.config.get("rope_parameters") else {"rope_type": "proportional", "partial_rotary_factor": 0.25}
        )

    def _read_rotary_share(self, settings: Mapping[str, Any]) -> None:
        if settings.get("rope_type") != "proportional":
            return super()._read_rotary_share(settings)
        self.rotated_share = positive_float("partial_rotary_factor", settings.get("partial_rotary_factor", 1.0))
        if self.rotated_share > 1 or settings.get("factor", 1.0) != 1:
            raise D2QError("config.json: rope_parameters' partial_rotary_factor must be at most 1, and its factor 1")

    def _recorded_kv_heads(self) -> int | list[int]:
        heads = [self._head(index)[0] for index in range(self.num_layers)]
        return heads if self.keys_are_values else self.num_kv_heads

    def _recorded_head_dim(self) -> int:
        return self.full_head[1]

    def _recorded_width(self) -> int | list[int]:
        return self._widths() if self.doubles_width else self.intermediate_size

    def _is_full(self, index: int) -> bool:
        return self.layer_types[index] == FULL

    def _has_keys(self, index: int) -> bool:
        return index < self.num_layers - self.sharing_layers

    def _head(self, index: int) -> tuple[int, int]:
        """Return the key-value heads of block `index`, and the channels of a head."""
        return self.full_head if self._is_full(index) else (self.num_kv_heads, self.head_dim)

    def _widths(self) -> list[int]:
        wider = 2 if self.doubles_width else 1
        blocks = range(self.num_layers)
        return [self.intermediate_size * (1 if self._has_keys(index) else wider) for index in blocks]

    def _check_attention(self) -> None:
        """Read what the blocks are like, and refuse what llama.cpp can't compute."""
        config, count = self.config, self.num_layers
        self.embedding_scale = math.sqrt(self.hidden_size)
        self.logit_cap = (
            self._float("final_logit_softcapping", default=0.0) if config.get("final_logit_softcapping") else 0.0
        )
        self.window = self._int("sliding_window", default=512)
        self.keys_are_values, self.doubles_width = self._flag("attention_k_eq_v"), self._flag("use_double_wide_mlp")
        self.sharing_layers = self._count("num_kv_shared_layers", 0, count - 1)
        self.per_layer_width = self._count("hidden_size_per_layer_input", 256, 2**20)
        types = config.get("layer_types")
        self.layer_types = (
            [FULL if (index + 1) % 6 == 0 else SLIDING for index in range(count)] if types is None else types
        )
        if (
            not isinstance(types, list | None)
            or [kind in (SLIDING, FULL) for kind in self.layer_types] != [True] * count
        ):
            raise D2QError(
                f"config.json: layer_types must name the attention of all {count} blocks, {SLIDING} or {FULL}"
            )
        if self._flag("enable_moe_block"):
            raise D2QError(
                "config.json: enable_moe_block is set, but of Gemma 4 only models without experts are supported"
            )
        if config.get("use_bidirectional_attention") not in (None, "vision"):
            raise D2QError('config.json: use_bidirectional_attention isn\'t supported, except for images ("vision")')
        if self.per_layer_width and self._int("vocab_size_per_layer_input", default=262144) != self.vocab_size:
            raise D2QError(
                "config.json: vocab_size_per_layer_input must be vocab_size; llama.cpp's gemma4 expects that"
            )
        own = self.layer_types[: count - self.sharing_layers]
        if self.layer_types[-1] != FULL or (self.sharing_layers and own[-2:] != [SLIDING, FULL]):
            raise D2QError(
                "config.json: the last of the layer_types must be full_attention, and so must the last one of a block "
                "with keys of its own, after sliding_attention; llama.cpp's gemma4 expects that"
            )
        self.full_head = self._full_head()
        heads = {SLIDING: (self.num_kv_heads, self.head_dim), FULL: self.full_head}
        self.shared_keys = {kind: heads[kind] for kind in heads if self.sharing_layers}

    def _count(self, key: str, default: int, maximum: int) -> int:
        """Return a setting that may be zero or null, which means none."""
        given = self.config.get(key, default)
        return 0 if given in (0, None) else self._int(key, default=default, maximum=maximum)

    def _full_head(self) -> tuple[int, int]:
        """Return the key-value heads, and the channels of a head, of layers with full attention."""
        names = ("num_global_key_value_heads", "global_head_dim")
        found: Any = {key: self.config.get(key) for key in names}
        if (given := self.config.get("per_layer_config")) is not None:
            full = {str(index) for index, kind in enumerate(self.layer_types) if kind == FULL}
            entries = list(given.values()) if isinstance(given, dict) and given.keys() == full else [None]
            if not isinstance(entries[0], dict) or any(entry != entries[0] for entry in entries):
                raise D2QError(
                    "config.json: per_layer_config must say the same of all layers with full attention alone"
                )
            found = dict(zip(names, map(entries[0].get, ("num_key_value_heads", "head_dim")), strict=True))
        elif not self.keys_are_values:
            found[names[0]] = None
        settings = Settings(found)
        heads, head_dim = settings._int(names[0], default=self.num_kv_heads), settings._int(names[1], default=512)
        if self.num_heads % heads or head_dim % 2:
            raise D2QError(
                f"config.json: {self.num_heads} heads don't suit {heads} key-value heads of {head_dim} channels"
            )
        return heads, head_dim
