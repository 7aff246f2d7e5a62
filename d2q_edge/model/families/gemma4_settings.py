"""Read what the blocks of a Gemma 4 are like: from config.json, or from the keys of a GGUF file.

llama.cpp: src/models/gemma4.cpp, load_arch_hparams; conversion/gemma.py, Gemma4Model. config.json has the heads of
layers with full attention as global_head_dim and num_global_key_value_heads, or, where transformers 5 has saved it, in
per_layer_config.
"""

import math
from collections.abc import Mapping
from typing import Any

import gguf

from d2q_edge.errors import D2QError
from d2q_edge.model.families.base import Family
from d2q_edge.model.families.gguf_keys import GGUFKeys
from d2q_edge.model.families.settings import Settings, positive_float

SLIDING, FULL = "sliding_attention", "full_attention"


class Gemma4Settings(Family):
    """The settings of Gemma 4.

    The config also sets window, layer_types, full_head (key-value heads, and channels of a head, of layers with full
    attention), keys_are_values, sharing_layers (the last ones, without keys of their own), doubles_width (of their
    feed-forward layers), rotated_share and sliding_rope_theta.
    """

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
