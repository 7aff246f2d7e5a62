"""Granite 4, hybrid: Mamba-2 in most blocks, attention without positions in the others, and Granite's multipliers; the
feed-forward layers are an MLP, in the larger models (tiny, small) with experts beside it.

llama.cpp: src/models/granite-hybrid.cpp; conversion/granite.py, GraniteHybridModel. model/granite4.py gives MLP and
experts the tensor names that the module made here has.
"""

from typing import Any

import gguf
from torch import nn

from d2q_edge.errors import D2QError
from d2q_edge.model.experts import Expert, MLPWithExperts
from d2q_edge.model.families.experts import MixtureOfExperts
from d2q_edge.model.families.gguf_keys import GGUFKeys
from d2q_edge.model.families.granite import Granite
from d2q_edge.model.families.layout import LinearGroup, RoutedExperts, Sublayer
from d2q_edge.model.families.mamba2 import Mamba2

MLP, NORM = "shared_mlp", "post_attention_layernorm"
GATE, UP, DOWN = f"{MLP}.gate_proj", f"{MLP}.up_proj", f"{MLP}.down_proj"
NO_LIMIT = 2**20
"""What llama.cpp's converter writes as the context length, because nothing depends on the position."""


class GraniteHybrid(Mamba2, MixtureOfExperts, Granite):
    """GraniteMoeHybridForCausalLM that has blocks with Mamba-2."""

    architectures = ("GraniteMoeHybridForCausalLM",)
    model_type = "granitemoehybrid"
    gguf_arch = "granitehybrid"
    records_space_prefix = False
    records_no_experts = True
    rope_types = ("default",)
    refused_flags = ("attention_bias", "mamba_proj_bias")
    normalizes_top_k = True
    normalizes_by_default = True
    stacked_parts = ("gate_proj", "up_proj", "down_proj")

    linear_groups = (
        *Granite.linear_groups[:2],
        LinearGroup(NORM, (GATE, UP)),
        LinearGroup(None, (DOWN,), absorber=UP),
    )
    sublayers = (Granite.sublayers[0], Sublayer(MLP, NORM))

    def block_experts(self, index: int) -> RoutedExperts | None:
        if not self.num_experts:
            return None
        return RoutedExperts(MLP, f"{MLP}.router", NORM, self.num_experts, self.expert_parts, (GATE, UP, DOWN))

    def linear_shape(self, index: int, linear: str) -> tuple[int, int]:
        wide = self.shared_width, self.hidden_size
        own = {GATE: wide, UP: wide, DOWN: wide[::-1]}
        return own[linear] if linear in own else super().linear_shape(index, linear)

    def adapt_block(self, index: int, block: nn.Module) -> None:
        """Put MLP and experts into one module with separate layers, where transformers has the MLP."""
        super().adapt_block(index, block)
        mlp: Any = block.get_submodule(MLP)
        routed: Any = getattr(block, "block_sparse_moe", None)
        sizes = self.hidden_size, self.shared_width, mlp.activation
        with next(mlp.parameters()).device:
            module = Expert(*sizes) if routed is None else MLPWithExperts(*sizes, routed.router, routed.experts)
        for name, value in ((MLP, module), ("block_sparse_moe", None), ("has_experts", False)):
            setattr(block, name, value)

    def gguf_name(self, hf_name: str) -> str:
        if not self.num_experts:
            return super().gguf_name(hf_name.replace(f"{MLP}.", "mlp."))
        for inner in ("experts", "router"):
            hf_name = hf_name.replace(f"{MLP}.{inner}.", f"mlp.{inner}.")
        return super().gguf_name(hf_name.replace(f".{MLP}.", f".mlp.{MLP}."))

    def add_metadata(self, writer: gguf.GGUFWriter, file_type: int) -> None:
        super().add_metadata(writer, file_type)
        writer.add_expert_shared_feed_forward_length(self.shared_width)
        self.add_mamba_keys(writer)
        writer.add_rope_scaling_finetuned(False)

    @classmethod
    def import_config(cls, keys: GGUFKeys) -> dict[str, Any]:
        if keys.value("rope.scaling.finetuned", True) is not False:
            raise D2QError(f"{keys.file.path} can't be converted: its attention has a rotary embedding")
        config = super().import_config(keys)
        experts = config.pop("num_experts")
        width = keys.whole("expert_shared_feed_forward_length", config["intermediate_size"])
        return config | {"num_local_experts": experts, "shared_intermediate_size": width}

    def _refuse_unsupported(self) -> None:
        super()._refuse_unsupported()
        self.context_length = NO_LIMIT
        if self.config.get("position_embedding_type") not in (None, "nope"):
            raise D2QError(
                "config.json: position_embedding_type is set, but llama.cpp's converter leaves it out of models with "
                "Mamba-2"
            )

    def _read_experts(self) -> None:
        self.shared_width = self._int("shared_intermediate_size", default=1024)
        if self.config.get("num_local_experts") == 0:
            if self.shared_width != self.intermediate_size:
                raise D2QError(
                    "config.json: without experts, llama.cpp's granitehybrid needs shared_intermediate_size "
                    f"({self.shared_width}) to be intermediate_size ({self.intermediate_size})"
                )
            return
        super()._read_experts()
