"""Llama 2, 3, 3.1, 3.2, SmolLM2 and other models of the same architecture.

llama.cpp: src/models/llama.cpp; conversion/llama.py, LlamaModel. It applies the rotary embedding to neighboring pairs
of rows, transformers to the two halves of a head, so the rows of q and k are reordered on export. Llama 3.1's frequency
scaling becomes the tensor rope_freqs.weight. A GGUF file whose tensor doesn't follow Llama 3.1's rule is read as having
transformers' "longrope" with the same factors for short and for long texts, which stands for any factors.
"""

import math
from typing import Any, ClassVar

import gguf
import numpy as np
import numpy.typing as npt
import torch

from d2q_edge.errors import D2QError
from d2q_edge.model.families.base import Family, Values
from d2q_edge.model.families.gguf_keys import GGUFKeys
from d2q_edge.model.families.settings import positive_float

ORIGINAL = "original_max_position_embeddings"


def interleave_halves(array: Values, heads: int) -> Values:
    """Interleave the two halves of every head's rows (first axis)."""
    split = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return split.swapaxes(1, 2).reshape(array.shape)


class Llama(Family):
    """LlamaForCausalLM; attention and MLP may have biases."""

    architectures = ("LlamaForCausalLM",)
    model_type = "llama"
    gguf_arch = "llama"
    rope_types: ClassVar[tuple[str, ...]] = ("default", "linear", "yarn", "llama3", "longrope")
    records_space_prefix = True

    def biased_linears(self) -> tuple[str, ...]:
        attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
        mlp = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
        return (attention if self._flag("attention_bias") else ()) + (mlp if self._flag("mlp_bias") else ())

    def export_rows(self, hf_name: str, array: Values) -> Values:
        """Interleave the two halves of every head of q and k: row (half, i) becomes row (i, half)."""
        module = hf_name.rpartition(".")[0]
        heads = {"q_proj": self.num_heads, "k_proj": self.num_kv_heads}.get(module.rpartition(".")[2])
        if heads is None:
            return array
        return interleave_halves(array, heads)

    def extra_tensors(self) -> dict[str, npt.NDArray[np.float32]]:
        if self.rope_type not in ("llama3", "longrope"):
            return {}
        return {"rope_freqs.weight": self._llama3_factors() if self.rope_type == "llama3" else self._given_factors()}

    def add_metadata(self, writer: gguf.GGUFWriter, file_type: int) -> None:
        super().add_metadata(writer, file_type)
        writer.add_vocab_size(self.vocab_size)
        writer.add_rope_dimension_count(self.head_dim)

    def _refuse_unsupported(self) -> None:
        super()._refuse_unsupported()
        # Both read settings that must be refused now, not when the file is written.
        self.biased_linears()
        self.extra_tensors()

    @classmethod
    def import_config(cls, keys: GGUFKeys) -> dict[str, Any]:
        config = super().import_config(keys)
        config["attention_bias"] = "blk.0.attn_q.bias" in keys.file.tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in keys.file.tensors
        if (factors := keys.factors("rope_freqs.weight")) is not None:
            rope = config["rope_parameters"]
            if rope["rope_type"] != "default" or 2 * len(factors) != keys.head_dim:
                raise D2QError(f"{keys.file.path} can't be converted: its rope_freqs.weight doesn't suit its settings")
            config["rope_parameters"] = rope | import_factors(factors, rope["rope_theta"])
        return config

    def _llama3_factors(self) -> npt.NDArray[np.float32]:
        defaults = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 8192}
        factor, low, high, context = (
            positive_float(f"rope_scaling's {key}", self.rope_scaling.get(key, default))
            for key, default in defaults.items()
        )
        if high <= low:
            raise D2QError("config.json: rope_scaling's high_freq_factor must be larger than its low_freq_factor")
        return llama3_factors(self.head_dim, self.rope_theta, factor, low, high, context)

    def _given_factors(self) -> npt.NDArray[np.float32]:
        short, long = self.rope_scaling.get("short_factor"), self.rope_scaling.get("long_factor")
        if short != long or self.rope_scaling.get("attention_factor") != 1:
            raise D2QError(
                "config.json: rope_scaling of type 'longrope' isn't supported for llama, unless short_factor and "
                "long_factor are the same and attention_factor is 1"
            )
        if not isinstance(short, list) or len(short) != self.head_dim // 2:
            raise D2QError(f"config.json: rope_scaling's short_factor must have {self.head_dim // 2} numbers")
        return np.array([positive_float("rope_scaling's short_factor", value) for value in short], np.float32)


def llama3_factors(
    head_dim: int, theta: float, factor: float, low: float, high: float, context: float
) -> npt.NDArray[np.float32]:
    """Return the divisors of the rotary frequencies by Llama 3.1's rule, float32 [head_dim / 2].

    They are 1 for wavelengths below `context / high`, `factor` above `context / low`, interpolated in between. Computed
    in the converter's order of operations in torch, so that the tensor equals its own bit by bit.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    wavelengths = 2 * math.pi / (1.0 / (theta**exponents))
    smooth = (context / wavelengths - low) / (high - low)
    factors = 1 / ((1 - smooth) / factor + smooth)
    factors[wavelengths < context / high] = 1.0
    factors[wavelengths > context / low] = factor
    return factors.numpy()


def import_factors(factors: list[float], theta: float) -> dict[str, Any]:
    """Return the rope_parameters that give the factors of a file's rope_freqs.weight exactly."""
    factor, low, high = max(factors), 1.0, 4.0  # low and high as in all published models
    for context in (2**exponent for exponent in range(4, 21)):
        if np.array_equal(
            llama3_factors(2 * len(factors), theta, factor, low, high, context), np.array(factors, np.float32)
        ):
            found = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high, ORIGINAL: context}
            return {"rope_type": "llama3", **found}
    same = {"short_factor": factors, "long_factor": factors}
    # transformers takes long_factor beyond the original context.
    return {"rope_type": "longrope", **same, "factor": 1.0, "attention_factor": 1.0, ORIGINAL: 2**20}
