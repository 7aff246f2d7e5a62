"""Qwen3.5, dense, text only: three blocks with Gated DeltaNet to one with attention, whose output is gated; norms that
multiply by 1 + weight, except the one inside DeltaNet; a quarter of every head is rotated.

llama.cpp: src/models/qwen35.cpp; conversion/qwen.py, Qwen3_5TextModel with --no-mtp, that is without the layers that
predict further tokens. q_proj puts out queries and gates; the gate multiplies, so that o's columns are proportional to
the rows of v. Rotary positions in time, height and width are the same for text.
"""

from collections.abc import Mapping
from typing import Any

import gguf

from d2q_edge.errors import D2QError
from d2q_edge.model.families.delta_net import GatedDeltaNet
from d2q_edge.model.families.gguf_keys import GGUFKeys
from d2q_edge.model.families.settings import positive_float

SECTIONS = [11, 11, 10]  # transformers' and llama.cpp's default


class Qwen3p5(GatedDeltaNet):
    """Qwen3_5ForCausalLM, the text model of Qwen3_5ForConditionalGeneration."""

    architectures = ("Qwen3_5ForCausalLM",)
    model_type = "qwen3_5_text"
    gguf_arch = "qwen35"
    rope_types = ("default",)
    norm_offset = 1.0
    qk_norms = True
    refused_flags = ("attention_bias",)
    default_kv_heads = 4
    default_head_dim = 256

    def linear_shape(self, index: int, linear: str) -> tuple[int, int]:
        rows, columns = super().linear_shape(index, linear)
        return (2 * rows if linear == "self_attn.q_proj" else rows), columns

    def add_metadata(self, writer: gguf.GGUFWriter, file_type: int) -> None:
        super().add_metadata(writer, file_type)
        writer.add_rope_dimension_count(self.rotary_dim)

    @classmethod
    def import_config(cls, keys: GGUFKeys) -> dict[str, Any]:
        config = super().import_config(keys)
        sections = keys.value("rope.dimension_sections", [*SECTIONS, 0])
        config["rope_parameters"]["mrope_section"] = sections[:3] if isinstance(sections, list) else sections
        return config

    def _add_rope(self, writer: gguf.GGUFWriter) -> None:
        writer.add_rope_dimension_sections([*self.sections, 0])
        super()._add_rope(writer)

    def _read_rotary_share(self, settings: Mapping[str, Any]) -> None:
        share = settings.get("partial_rotary_factor", self.config.get("partial_rotary_factor"))
        share = positive_float("partial_rotary_factor", 0.25 if share is None else share)
        self.rotary_dim = int(self.head_dim * min(share, 1.0))
        if share > 1 or self.rotary_dim % 2 or not self.rotary_dim:
            raise D2QError(f"config.json: a partial_rotary_factor of {share:g} doesn't suit heads of {self.head_dim}")
        self.sections = settings.get("mrope_section", SECTIONS)
        if not isinstance(self.sections, list) or [type(each) for each in self.sections] != [int] * 3:
            raise D2QError("config.json: rope_parameters' mrope_section must be three whole numbers")
        if not all(0 <= each < 2**31 for each in self.sections):
            raise D2QError("config.json: rope_parameters' mrope_section must not be negative or huge")
