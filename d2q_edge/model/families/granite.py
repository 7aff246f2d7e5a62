"""Granite 3: Llama's block with multipliers of the embeddings, the attention, the sublayers' outputs and the logits.

llama.cpp: src/models/granite.cpp; conversion/granite.py, GraniteModel, which has no head size of its own: heads are as
wide as they fill the hidden state.
"""

from typing import Any, ClassVar

import gguf

from d2q_edge.model.families.gguf_keys import GGUFKeys
from d2q_edge.model.families.llama import Llama
from d2q_edge.model.families.settings import positive_float

MULTIPLIERS = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
"""Setting in config.json and key in the file; the logits are divided by theirs."""


class Granite(Llama):
    """GraniteForCausalLM."""

    architectures = ("GraniteForCausalLM",)
    model_type = "granite"
    gguf_arch = "granite"
    rope_types: ClassVar[tuple[str, ...]] = ("default", "linear", "yarn")
    refused_flags = ("attention_bias", "mlp_bias")
    full_width_heads = True

    def add_metadata(self, writer: gguf.GGUFWriter, file_type: int) -> None:
        super().add_metadata(writer, file_type)
        writer.add_attention_scale(self.attention_scale)
        writer.add_embedding_scale(self.embedding_scale)
        writer.add_residual_scale(self.residual_scale)
        writer.add_logit_scale(self.logits_divisor)

    @classmethod
    def import_config(cls, keys: GGUFKeys) -> dict[str, Any]:
        return super().import_config(keys) | {name: keys.decimal(key) for name, key in MULTIPLIERS.items()}

    def _records_head_dim(self) -> bool:
        return False

    def _refuse_unsupported(self) -> None:
        super()._refuse_unsupported()
        attention, embedding, residual, logits = (
            positive_float(name, self.config.get(name, 1.0)) for name in MULTIPLIERS
        )
        self.attention_scale, self.embedding_scale, self.residual_scale = attention, embedding, residual
        self.logits_divisor, self.logit_scale = logits, 1 / logits
