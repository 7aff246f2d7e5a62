"""LFM2 and LFM2.5, dense: short convolutions in most blocks, attention with norms per head on q and k in the others.

llama.cpp: src/models/lfm2.cpp; conversion/lfm2.py, LFM2Model. It has no biases. Blocks without attention have no
key-value heads in the file.

A convolution's in_proj puts out B, C and x; out_proj reads C * conv(B * x), and conv works on every channel by itself.
So the columns of out_proj are proportional to the rows of x, which absorb their scales. The kernel, three weights per
channel, stays f32.
"""

from typing import Any, ClassVar

import gguf
import numpy as np
import numpy.typing as npt

from d2q_edge.errors import D2QError
from d2q_edge.model.families.base import Family
from d2q_edge.model.families.gguf_keys import GGUFKeys
from d2q_edge.model.families.layout import LinearGroup, Sublayer
from d2q_edge.model.families.settings import positive_float

LAYER_TYPES = ("conv", "full_attention")
MLP = (
    LinearGroup("ffn_norm", ("feed_forward.w1", "feed_forward.w3")),
    LinearGroup(None, ("feed_forward.w2",), absorber="feed_forward.w3"),
)
GROUPS = {
    "conv": (
        LinearGroup("operator_norm", ("conv.in_proj",)),
        LinearGroup(None, ("conv.out_proj",), absorber="conv.in_proj"),
        *MLP,
    ),
    "full_attention": (
        LinearGroup("operator_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        LinearGroup(None, ("self_attn.out_proj",), absorber="self_attn.v_proj"),
        *MLP,
    ),
}


class Lfm2(Family):
    """Lfm2ForCausalLM."""

    architectures: ClassVar[tuple[str, ...]] = ("Lfm2ForCausalLM", "LFM2ForCausalLM")
    model_type = "lfm2"
    gguf_arch = "lfm2"
    records_default_head_dim = False
    rope_types = ("default",)
    refused_flags = ("conv_bias",)
    full_width_heads = True
    norm_eps_key = "norm_eps"
    default_norm_eps = 1e-5
    default_rope_theta = 1000000.0
    default_kv_heads = 8
    tied_keys = ("tie_embedding", "tie_word_embeddings")
    tied_by_default = True
    final_norm = "model.embedding_norm"

    def block_groups(self, index: int) -> tuple[LinearGroup, ...]:
        return GROUPS[self.layer_types[index]]

    def block_sublayers(self, index: int) -> tuple[Sublayer, ...]:
        first = "conv" if self.layer_types[index] == "conv" else "self_attn"
        return Sublayer(first, "operator_norm"), Sublayer("feed_forward", "ffn_norm")

    def block_norms(self, index: int) -> dict[str, int]:
        heads = ("self_attn.q_layernorm", "self_attn.k_layernorm") if self.layer_types[index] != "conv" else ()
        return super().block_norms(index) | dict.fromkeys(heads, self.head_dim)

    def block_constants(self, index: int) -> dict[str, tuple[int, ...]]:
        if self.layer_types[index] != "conv":
            return {}
        return {"conv.conv.weight": (self.hidden_size, 1, self.taps)}

    def state_elements(self, index: int) -> int:
        return (self.taps - 1) * self.hidden_size if self.layer_types[index] == "conv" else 0

    def linear_shape(self, index: int, linear: str) -> tuple[int, int]:
        wide = self.intermediate_size, self.hidden_size
        own = {
            "conv.in_proj": (3 * self.hidden_size, self.hidden_size),
            "conv.out_proj": (self.hidden_size, self.hidden_size),
            "self_attn.out_proj": (self.hidden_size, self.hidden_size),
            "feed_forward.w1": wide,
            "feed_forward.w2": wide[::-1],
            "feed_forward.w3": wide,
        }
        return own[linear] if linear in own else super().linear_shape(index, linear)

    def absorber_rows(self, index: int, absorber: str) -> npt.NDArray[np.int64]:
        """Return the rows of x, the last third of a convolution's in_proj; others as in every family."""
        if absorber == "conv.in_proj":
            return 2 * self.hidden_size + np.arange(self.hidden_size)
        return super().absorber_rows(index, absorber)

    def add_metadata(self, writer: gguf.GGUFWriter, file_type: int) -> None:
        super().add_metadata(writer, file_type)
        writer.add_vocab_size(self.vocab_size)
        writer.add_shortconv_l_cache(self.taps)

    @classmethod
    def import_config(cls, keys: GGUFKeys) -> dict[str, Any]:
        config = super().import_config(keys)
        heads = keys.value("attention.head_count_kv", config["num_key_value_heads"])
        counts = heads if isinstance(heads, list) else [heads] * config["num_hidden_layers"]
        return config | {
            "norm_eps": config.pop("rms_norm_eps"),
            "layer_types": ["full_attention" if count else "conv" for count in counts],
            "block_auto_adjust_ff_dim": False,
            "conv_L_cache": keys.whole("shortconv.l_cache"),
        }

    def _recorded_kv_heads(self) -> list[int]:
        return [0 if kind == "conv" else self.num_kv_heads for kind in self.layer_types]

    def _refuse_unsupported(self) -> None:
        super()._refuse_unsupported()
        self.taps = self._int("conv_L_cache", default=3)

    def _feed_forward_width(self) -> int:
        """Return the width of w1 and w3, which config.json may say indirectly."""
        width = self._int("block_ff_dim" if self.config.get("block_ff_dim") is not None else "intermediate_size")
        if not self._flag("block_auto_adjust_ff_dim", default=True):
            return width
        multiple = self._int("block_multiple_of", default=256)
        multiplier = self.config.get("block_ffn_dim_multiplier")
        factor = positive_float("block_ffn_dim_multiplier", 1.0 if multiplier is None else multiplier)
        # Rounded down twice, then up, as transformers and llama.cpp's converter do it.
        scaled = factor * int(2 * width / 3)
        if not 1 <= scaled < 2**31:
            raise D2QError("config.json: block_ffn_dim_multiplier makes no sense for the width of the layers")
        return -(-int(scaled) // multiple) * multiple

    def _check_attention(self) -> None:
        types, attention = self.config.get("layer_types"), self.config.get("full_attn_idxs")
        if types is None and (attention is None or isinstance(attention, list)):
            types = [LAYER_TYPES[attention is None or index in attention] for index in range(self.num_layers)]
        if not isinstance(types, list) or [kind in LAYER_TYPES for kind in types] != [True] * self.num_layers:
            raise D2QError(
                f"config.json: layer_types must name the kind of all {self.num_layers} blocks, each one of "
                f"{', '.join(LAYER_TYPES)}"
            )
        self.layer_types: list[str] = types
