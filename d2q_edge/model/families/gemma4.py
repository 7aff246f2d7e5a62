"""Gemma 4 without experts, text only: dense models, and E2B and E4B, whose blocks have embeddings for themselves.

llama.cpp: src/models/gemma4.cpp; conversion/gemma.py, Gemma4Model. Layers with full attention have larger heads, other
rotary embeddings, of which most channels aren't rotated, and in the dense models keys that are also the values. The
last blocks of E2B and E4B compute neither keys nor values: they read those of the last block of their kind that does.

Values are normalized without weights, so that nothing can absorb column scales of o; nor is there anything for the
scales of per_layer_projection, which reads a product with the block's own embeddings.
"""

import math

import gguf
import numpy as np
import numpy.typing as npt
from torch import nn

from d2q_edge.model.families.gemma4_settings import SLIDING, Gemma4Settings
from d2q_edge.model.families.layout import LinearGroup, Sublayer
from d2q_edge.model.families.side_inputs import GATE, PROJECTION, PerLayerBranch

UNROTATED = 1e30  # by which llama.cpp divides the angles of channels that aren't rotated
PER_LAYER = (LinearGroup(None, (GATE,), reads_stream=True), LinearGroup(None, (PROJECTION,)))
MLP = (
    LinearGroup("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    LinearGroup(None, ("mlp.down_proj",), absorber="mlp.up_proj"),
)


class Gemma4(Gemma4Settings):
    """Gemma4ForCausalLM, the text model of Gemma4ForConditionalGeneration."""

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
