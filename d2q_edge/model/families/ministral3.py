"""Ministral 3: Llama's block without biases, with YaRN and queries that grow with their position.

llama.cpp: src/models/mistral3.cpp; conversion/mistral3.py. Queries are multiplied by 1 + beta * log(1 + floor(p / n))
at position p, which is 1 within the n tokens of the original context. Where the file has YaRN's logarithm multiplier,
llama.cpp divides its own factor of cosines and sines by 0.1 * multiplier * log(factor) + 1, as transformers does.

The published checkpoints also see images: their text model is taken (`multimodal.py`).
"""

import math
from typing import Any

import gguf

from d2q_edge.model.families.gguf_keys import GGUFKeys
from d2q_edge.model.families.llama import Llama
from d2q_edge.model.families.settings import positive_float

BETA = "llama_4_scaling_beta"
LOGARITHM = "mscale_all_dim"


class Ministral3(Llama):
    """Ministral3ForCausalLM."""

    architectures = ("Ministral3ForCausalLM",)
    model_type = "ministral3"
    gguf_arch = "mistral3"
    rope_types = ("yarn",)
    default_norm_eps = 1e-5
    default_kv_heads = 8
    default_head_dim = 128

    def biased_linears(self) -> tuple[str, ...]:
        return ()

    def add_metadata(self, writer: gguf.GGUFWriter, file_type: int) -> None:
        super().add_metadata(writer, file_type)
        writer.add_rope_scaling_yarn_log_mul(self.rope_scaling[LOGARITHM])
        writer.add_attn_temperature_scale(self.rope_scaling[BETA])

    @classmethod
    def import_config(cls, keys: GGUFKeys) -> dict[str, Any]:
        config = super().import_config(keys)
        rope = config["rope_parameters"]
        rope |= {"mscale": 1.0, LOGARITHM: keys.decimal("rope.scaling.yarn_log_multiplier")}
        rope[BETA] = keys.decimal("attention.temperature_scale")
        if "attention_factor" in rope:
            rope["attention_factor"] /= _factor(rope[LOGARITHM], rope["factor"])
        return config

    @property
    def _own_multiplier(self) -> float:
        scaling = self.rope_scaling
        return super()._own_multiplier / _factor(scaling[LOGARITHM], scaling["factor"])

    def _read_rope(self) -> None:
        super()._read_rope()
        for key in (BETA, LOGARITHM):
            positive_float(f"rope_parameters' {key}", self.rope_scaling.get(key))

    def _check_attention(self) -> None:
        super()._check_attention()
        if self.config.get("sliding_window") is not None:
            self.ignored_window = self._int("sliding_window")


def _factor(multiplier: float, factor: float) -> float:
    return 0.1 * multiplier * math.log(max(factor, 1.0)) + 1
