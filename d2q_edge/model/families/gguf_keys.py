"""Read a model's settings back from the keys of a GGUF file, the inverse of what families write.

Which keys llama.cpp reads, and its defaults: src/llama-model.cpp, load_hparams, and src/models/ARCH.cpp. What it doesn't
read has no meaning in the file and is ignored.
"""

import math
from typing import Any

import numpy as np

from d2q_edge.errors import D2QError
from d2q_edge.formats.gguf_reader import GGUFFile


class GGUFKeys:
    """The `ARCH.*` keys of a GGUF file, which is untrusted; all methods raise D2QError for an invalid or missing value."""

    def __init__(self, file: GGUFFile, arch: str) -> None:
        self.file, self.arch = file, arch

    def __contains__(self, key: str) -> bool:
        return f"{self.arch}.{key}" in self.file.kv

    @property
    def head_dim(self) -> int:
        """Return the width of a head."""
        default = self.whole("embedding_length") // max(self.whole("attention.head_count"), 1)
        return max(self.whole("attention.key_length", default), 1)

    def value(self, key: str, default: Any) -> Any:
        """Return any value."""
        value = self.file.kv.get(f"{self.arch}.{key}", default)
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

    def text(self, key: str, default: str) -> str:
        """Return a text."""
        value = self.value(key, default)
        if not isinstance(value, str):
            raise D2QError(f"{self.file.path} is malformed: its key {self.arch}.{key} is {value!r:.40}, not a text")
        return value

    def rows(self, tensor: str) -> int:
        """Return the number of rows of a tensor."""
        if tensor not in self.file.tensors:
            raise D2QError(f"{self.file.path} has no tensor {tensor}; if it is only a vocabulary, give the whole model")
        return self.file.tensors[tensor].shape[0]

    def factors(self, tensor: str) -> list[float] | None:
        """Return the rotary factors in a one-dimensional tensor, if the file has it."""
        if tensor not in self.file.tensors:
            return None
        if len(self.file.tensors[tensor].shape) != 1:
            raise D2QError(f"{self.file.path} is malformed: its tensor {tensor} isn't a list of factors")
        values: list[float] = self.file.dequantize(tensor).tolist()
        return values

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
