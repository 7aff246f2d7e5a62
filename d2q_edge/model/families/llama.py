"""Llama 2, 3, 3.1, 3.2, SmolLM2 and other models of the same architecture.

llama.cpp: src/models/llama.cpp; conversion/llama.py, LlamaModel. It applies the rotary embedding to neighboring pairs
of rows, transformers to the two halves of a head, so the rows of q and k are reordered on export. Llama 3.1's frequency
scaling becomes the tensor rope_freqs.weight.
"""

import math
from typing import ClassVar

import gguf
import numpy as np
import numpy.typing as npt
import torch

from d2q_edge.errors import D2QError
from d2q_edge.model.families.base import Family, Values
from d2q_edge.model.families.settings import positive_float


def interleave_halves(array: Values, heads: int) -> Values:
    """Interleave the two halves of every head's rows (first axis)."""
    split = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return split.swapaxes(1, 2).reshape(array.shape)


class Llama(Family):
    """LlamaForCausalLM; attention and MLP may have biases."""

    architectures = ("LlamaForCausalLM",)
    model_type = "llama"
    gguf_arch = "llama"
    rope_types: ClassVar[tuple[str, ...]] = ("default", "llama3")
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
        return {"rope_freqs.weight": self._rope_factors()} if self.rope_type == "llama3" else {}

    def add_metadata(self, writer: gguf.GGUFWriter, file_type: int) -> None:
        super().add_metadata(writer, file_type)
        writer.add_vocab_size(self.vocab_size)
        writer.add_rope_dimension_count(self.head_dim)

    def _refuse_unsupported(self) -> None:
        super()._refuse_unsupported()
        # Both read settings that must be refused now, not when the file is written.
        self.biased_linears()
        self.extra_tensors()

    def _rope_factors(self) -> npt.NDArray[np.float32]:
        """Return the divisors of the rotary frequencies by Llama 3.1's rule, float32 [head_dim / 2].

        They are 1 for short wavelengths, `factor` for those beyond the original context, interpolated in between.
        Computed in the converter's order of operations in torch, so that the tensor equals its own bit by bit.
        """
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        factor, low, high, context = (
            positive_float(f"rope_scaling's {key}", self.rope_scaling.get(key, default))
            for key, default in zip(keys, (8.0, 1.0, 4.0, 8192), strict=True)
        )
        if high <= low:
            raise D2QError("config.json: rope_scaling's high_freq_factor must be larger than its low_freq_factor")
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        wavelengths = 2 * math.pi / (1.0 / (self.rope_theta**exponents))
        smooth = (context / wavelengths - low) / (high - low)
        factors = 1 / ((1 - smooth) / factor + smooth)
        factors[wavelengths < context / high] = 1.0
        factors[wavelengths > context / low] = factor
        return factors.numpy()
