"""Read a model's settings back from the keys of a GGUF file, the inverse of what families write.

Which keys llama.cpp reads, and its defaults: src/llama-model.cpp, load_hparams, and src/models/ARCH.cpp. What it
doesn't read has no meaning in the file and is ignored.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from d2q_edge.errors import D2QError
from d2q_edge.formats.gguf_reader import GGUFFile

EMBEDDING = "token_embd.weight"


class GGUFKeys:
    """The `ARCH.*` keys of an untrusted GGUF file; all methods raise D2QError for an invalid or missing value."""

    def __init__(self, file: GGUFFile, arch: str, replaced: Mapping[str, Any] | None = None) -> None:
        self.file, self.arch, self._replaced = file, arch, replaced or {}

    def replaced(self, values: Mapping[str, Any]) -> "GGUFKeys":
        """Return the same keys but for these values, such as those of one kind of block."""
        return GGUFKeys(self.file, self.arch, values)

    def __contains__(self, key: str) -> bool:
        return f"{self.arch}.{key}" in self.file.kv

    @property
    def head_dim(self) -> int:
        """Return the width of a head."""
        default = self.whole("embedding_length") // max(self.whole("attention.head_count"), 1)
        return max(self.whole("attention.key_length", default), 1)

    def value(self, key: str, default: Any) -> Any:
        """Return any value."""
        value = self._replaced.get(key, self.file.kv.get(f"{self.arch}.{key}", default))
        if value is None:
            raise D2QError(f"{self.file.path} has no key {self.arch}.{key}, without which it isn't a complete model")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        """Return a whole number; an array, which has a number for every block, must repeat one."""
        value = self.value(key, default)
        if isinstance(value, list) and len(set(map(repr, value))) == 1:
            value = value[0]
        if type(value) is not int or value < 0:
            what = "differs between blocks, which isn't supported" if isinstance(value, list) else f"is {value!r:.40}"
            raise D2QError(f"{self.file.path} can't be converted: its key {self.arch}.{key} {what}")
        return value

    def decimal(self, key: str, default: float | None = None) -> float:
        """Return a float32 key as the shortest decimal number that it can be: 1e-05, not 9.99999974e-06."""
        value = self.value(key, default)
        limit = float(np.finfo(np.float32).max)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -limit <= value <= limit:
            raise D2QError(f"{self.file.path} is malformed: its key {self.arch}.{key} is {value!r:.40}, not a number")
        return float(str(np.float32(value)))

    def kv_heads(self, default: int) -> int:
        """Return the number of key-value heads; blocks without attention have none."""
        value = self.value("attention.head_count_kv", default)
        counts = [count for count in value if count != 0] if isinstance(value, list) else []
        if len(set(map(repr, counts))) > 1 or (counts and type(counts[0]) is not int):
            key = f"{self.arch}.attention.head_count_kv"
            raise D2QError(f"{self.file.path} can't be converted: its key {key} differs between blocks")
        return counts[0] if counts else self.whole("attention.head_count_kv", default)

    def text(self, key: str, default: str) -> str:
        """Return a text."""
        value = self.value(key, default)
        if not isinstance(value, str):
            raise D2QError(f"{self.file.path} is malformed: its key {self.arch}.{key} is {value!r:.40}, not a text")
        return value

    def factors(self, tensor: str) -> list[float] | None:
        """Return the rotary factors in a one-dimensional tensor, if the file has it."""
        if tensor not in self.file.tensors:
            return None
        if len(self.file.tensors[tensor].shape) != 1:
            raise D2QError(f"{self.file.path} is malformed: its tensor {tensor} isn't a list of factors")
        values: list[float] = self.file.dequantize(tensor).tolist()
        return values

    def common_config(self) -> dict[str, Any]:
        """Return the entries of config.json that do not depend on the family."""
        tensors, heads, head_dim = self.file.tensors, self.whole("attention.head_count"), self.head_dim
        if EMBEDDING not in tensors:
            raise D2QError(f"{self.file.path} has no tensor {EMBEDDING}, without which it isn't a complete model")
        if self.whole("attention.value_length", head_dim) != head_dim:
            raise D2QError(f"{self.file.path} can't be converted: its keys and values differ in width")
        rope = {"rope_theta": self.decimal("rope.freq_base", 10000.0), **self.rope_scaling()}
        if (rotary_dim := self.whole("rope.dimension_count", head_dim)) != head_dim:
            rope["partial_rotary_factor"] = rotary_dim / head_dim
        return {
            "vocab_size": tensors[EMBEDDING].shape[0],
            "hidden_size": self.whole("embedding_length"),
            "intermediate_size": self.whole("feed_forward_length"),
            "num_hidden_layers": self.whole("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.kv_heads(heads),
            "max_position_embeddings": self.whole("context_length"),
            "rms_norm_eps": self.decimal("attention.layer_norm_rms_epsilon"),
            "tie_word_embeddings": "output.weight" not in tensors,
            "rope_parameters": rope,
            # transformers' defaults may lie beyond the vocabulary.
            **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        }

    def rope_scaling(self) -> dict[str, Any]:
        """Return config.json's rope_parameters without rope_theta, for the scalings that need no tensor."""
        kind = self.text("rope.scaling.type", "linear")
        factor = self.decimal("rope.scaling.factor", self.decimal("rope.scale_linear", 0.0))
        if kind == "none" or (kind == "linear" and factor in (0, 1)):
            return {"rope_type": "default"}
        if kind != "yarn":
            return {"rope_type": kind, "factor": factor}
        original = self.whole("rope.scaling.original_context_length", self.whole("context_length"))
        scaling = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}
        # llama.cpp multiplies attn_factor with YaRN's own; yarn_attn_factor only records that config.json had one.
        if "rope.scaling.attn_factor" in self or "rope.scaling.yarn_attn_factor" in self:
            own = 0.1 * math.log(max(factor, 1.0)) + 1
            scaling["attention_factor"] = self.decimal("rope.scaling.attn_factor", 1.0) * own
        for key, name in (("yarn_ext_factor", "extrapolation_factor"), ("yarn_beta_fast", ""), ("yarn_beta_slow", "")):
            if f"rope.scaling.{key}" in self:
                scaling[name or key.removeprefix("yarn_")] = self.decimal(f"rope.scaling.{key}")
        return scaling
