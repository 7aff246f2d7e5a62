"""What a model family is: its layers, their order and shapes, and how its tensors and settings are written in a GGUF.

A family is bound to one config.json and refuses configs that it can't represent. It is pure data and arithmetic on
shapes and rows: it does not read weights, and it knows nothing about quantization.
"""

from __future__ import annotations

import math
import re
from abc import ABC
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar

import gguf
import numpy as np
import numpy.typing as npt

from d2q_edge.errors import D2QError

# More layers than any model has; a guard against a config.json that would make us build names forever.
MAX_LAYERS = 10_000


@dataclass(frozen=True)
class Stage:
    """Linear layers of one block that read the same input, in forward order.

    `norm` is the norm that makes this input, or None when the input comes from elsewhere in the block (attention
    output, gated activation). `source` is then the linear layer whose output this input is proportional to: scaling one
    of its rows scales the input's columns that `Family.source_rows` maps to that row, and nothing else. All names are
    module names relative to the block, without ".weight".
    """

    norm: str | None
    linears: tuple[str, ...]
    source: str | None = None


@dataclass(frozen=True)
class Half:
    """One residual branch of a block: residual + output_norm(module(norm(residual))), by names relative to the block.

    `output_norm` is None where the module's output is added as it is.
    """

    module: str
    norm: str
    output_norm: str | None = None


class Family(ABC):
    """A decoder family, bound to one model's config. Get one with `families.family_for`.

    The attributes set from the config: num_layers, hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim,
    vocab_size, context_length, norm_eps, rope_theta, rope_scaling (a dict when it isn't the default), tied_embeddings.
    """

    architectures: ClassVar[tuple[str, ...]]
    """The names in config.json's `architectures` that this family handles."""
    gguf_arch: ClassVar[str]
    """llama.cpp's name for the architecture, the prefix of its GGUF keys."""
    rope_types: ClassVar[tuple[str, ...]] = ("default",)
    """Values of rope_scaling's type that the exported file can express."""
    records_space_prefix: ClassVar[bool] = False
    """Whether llama.cpp's converter records the tokenizer's add_prefix_space for this architecture."""

    stages: ClassVar[tuple[Stage, ...]] = (
        Stage("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Stage(None, ("self_attn.o_proj",), source="self_attn.v_proj"),
        Stage("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        Stage(None, ("mlp.down_proj",), source="mlp.up_proj"),
    )
    halves: ClassVar[tuple[Half, ...]] = (
        Half("self_attn", "input_layernorm"),
        Half("mlp", "post_attention_layernorm"),
    )
    norm_offset: ClassVar[float] = 0.0
    """What is added to a norm's weight before it multiplies."""
    embedding: ClassVar[str] = "model.embed_tokens"
    final_norm: ClassVar[str] = "model.norm"
    head: ClassVar[str] = "lm_head"

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Read and check the config.

        Raises:
            D2QError: a setting is missing, makes no sense, or is one that this family can't export faithfully.
        """
        self.config = config
        self.num_layers = self._int("num_hidden_layers", maximum=MAX_LAYERS)
        self.hidden_size = self._int("hidden_size")
        self.intermediate_size = self._int("intermediate_size")
        self.num_heads = self._int("num_attention_heads")
        self.num_kv_heads = self._int("num_key_value_heads", default=self.num_heads)
        self.head_dim = self._int("head_dim", default=self._default_head_dim())
        self.vocab_size = self._int("vocab_size")
        self.context_length = self._int("max_position_embeddings")
        self.norm_eps = self._float("rms_norm_eps", default=1e-6)
        self.tied_embeddings = self._flag("tie_word_embeddings")
        if self.num_heads % self.num_kv_heads:
            raise D2QError(
                f"config.json: num_attention_heads ({self.num_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise D2QError(f"config.json: head_dim must be even, not {self.head_dim}")
        self._read_rope()
        self._refuse_unsupported()

    @property
    def block_linears(self) -> tuple[str, ...]:
        """All linear layers of one block in forward order, relative to the block."""
        return tuple(linear for stage in self.stages for linear in stage.linears)

    @property
    def residual_readers(self) -> Mapping[str, str]:
        """The block's linear layers that read the residual stream, each with the norm through which it does."""
        return {linear: stage.norm for stage in self.stages if stage.norm is not None for linear in stage.linears}

    @property
    def residual_writers(self) -> tuple[str, ...]:
        """The block's linear layers whose outputs are added to the residual stream: the last of every branch, which in
        these blocks are those that no norm feeds."""
        return tuple(linear for stage in self.stages if stage.norm is None for linear in stage.linears)

    @property
    def embedding_scale(self) -> float:
        """What embeddings are multiplied by before the first block."""
        return 1.0

    @property
    def can_rotate(self) -> bool:
        """Whether the residual stream may be put into another basis (quantize/rotation.py)."""
        return True

    def sliding_window(self, index: int) -> int | None:
        """How many tokens block `index` looks back on, itself included; None for all."""
        return None

    def half_of(self, stage: Stage) -> Half:
        """The half of the block to which a stage belongs."""
        return next(half for half in self.halves if stage.linears[0].startswith(f"{half.module}."))

    def block_prefix(self, index: int) -> str:
        """The prefix that turns a name relative to block `index` into a full one."""
        return f"model.layers.{index}."

    def block_of(self, name: str) -> int | None:
        """The number of the block that a tensor or module belongs to, by its full name; None outside the blocks."""
        match = re.fullmatch(re.escape(self.block_prefix(0)).replace("0", r"(\d+)", 1) + ".*", name)
        return int(match[1]) if match else None

    def linear_weights(self) -> list[str]:
        """The weight tensors of every block's linear layers, by full name, in forward order."""
        return [
            f"{self.block_prefix(i)}{linear}.weight" for i in range(self.num_layers) for linear in self.block_linears
        ]

    def linear_shape(self, linear: str) -> tuple[int, int]:
        """(out_features, in_features) of a block's linear layer, the shape of its weight."""
        attention, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (attention, self.hidden_size),
            "self_attn.k_proj": (kv, self.hidden_size),
            "self_attn.v_proj": (kv, self.hidden_size),
            "self_attn.o_proj": (self.hidden_size, attention),
            "mlp.gate_proj": (self.intermediate_size, self.hidden_size),
            "mlp.up_proj": (self.intermediate_size, self.hidden_size),
            "mlp.down_proj": (self.hidden_size, self.intermediate_size),
        }[linear]

    def source_rows(self, source: str) -> npt.NDArray[np.int64]:
        """For every column of the input that `source` makes, the row of `source` that it is proportional to.

        One to one for the gated activation; a row of v serves its channel in all query heads of its group.
        """
        if source != "self_attn.v_proj":
            return np.arange(self.linear_shape(source)[0])
        rows = np.arange(self.num_kv_heads * self.head_dim).reshape(self.num_kv_heads, 1, self.head_dim)
        return rows.repeat(self.num_heads // self.num_kv_heads, axis=1).reshape(-1)

    def biased_linears(self) -> tuple[str, ...]:
        """The block's linear layers that have a bias."""
        return ()

    def block_norms(self) -> dict[str, int]:
        """The block's norm weights and their lengths, relative to the block, without ".weight"."""
        return {stage.norm: self.hidden_size for stage in self.stages if stage.norm is not None}

    def tensor_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name and shape of every tensor that the checkpoint must have, and there are no others."""
        return self._tensor_shapes

    @cached_property
    def _tensor_shapes(self) -> Mapping[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {f"{self.embedding}.weight": (self.vocab_size, self.hidden_size)}
        for index in range(self.num_layers):
            prefix = self.block_prefix(index)
            for linear in self.block_linears:
                shapes[f"{prefix}{linear}.weight"] = self.linear_shape(linear)
            for linear in self.biased_linears():
                shapes[f"{prefix}{linear}.bias"] = self.linear_shape(linear)[:1]
            for norm, width in self.block_norms().items():
                shapes[f"{prefix}{norm}.weight"] = (width,)
        shapes[f"{self.final_norm}.weight"] = (self.hidden_size,)
        if not self.tied_embeddings:
            shapes[f"{self.head}.weight"] = (self.vocab_size, self.hidden_size)
        return MappingProxyType(shapes)

    def gguf_name(self, hf_name: str) -> str:
        """The GGUF name of a tensor, for example "blk.0.attn_q.weight".

        Raises:
            KeyError: llama.cpp's architecture has no such tensor.
        """
        name = self._gguf_names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise KeyError(hf_name)
        return str(name)

    def export_rows(self, hf_name: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Reorder a tensor's rows (first axis) for the file; the identity here.

        Works on weights, biases and packed rows of any dtype, because whole rows move.
        """
        return array

    def extra_tensors(self) -> dict[str, npt.NDArray[np.float32]]:
        """Tensors that the file needs and the checkpoint doesn't have, by GGUF name."""
        return {}

    def add_metadata(self, writer: gguf.GGUFWriter, file_type: int) -> None:
        """Add the model's settings, the `ARCH.*` keys and general.file_type, in llama.cpp's converter's order."""
        writer.add_block_count(self.num_layers)
        writer.add_context_length(self.context_length)
        writer.add_embedding_length(self.hidden_size)
        writer.add_feed_forward_length(self.intermediate_size)
        writer.add_head_count(self.num_heads)
        writer.add_head_count_kv(self.num_kv_heads)
        writer.add_rope_freq_base(self.rope_theta)
        writer.add_layer_norm_rms_eps(self.norm_eps)
        if self._writes_head_dim():
            writer.add_key_length(self.head_dim)
            writer.add_value_length(self.head_dim)
        writer.add_file_type(file_type)

    def _writes_head_dim(self) -> bool:
        return True

    def _default_head_dim(self) -> int | None:
        """head_dim when the config doesn't say; None when it must say (or the widths don't divide)."""
        return self.hidden_size // self.num_heads if self.hidden_size % self.num_heads == 0 else None

    @cached_property
    def _gguf_names(self) -> Any:
        arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == self.gguf_arch)
        return gguf.get_tensor_name_map(arch, self.num_layers)

    def _read_rope(self) -> None:
        """Rotary settings: `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
        scaling = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        if not isinstance(scaling, Mapping):
            raise D2QError("config.json: rope_scaling must be an object")
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        if kind not in self.rope_types or any(isinstance(value, Mapping) for value in scaling.values()):
            raise D2QError(
                f"config.json: rope_scaling of type {kind!r} isn't supported for {self.gguf_arch} "
                f"(supported: {', '.join(self.rope_types)})"
            )
        self.rope_type: str = kind
        self.rope_scaling: Mapping[str, Any] = scaling
        theta = scaling.get("rope_theta", self.config.get("rope_theta"))
        self.rope_theta = positive_float("rope_theta", 10000.0 if theta is None else theta)
        for place in (self.config, scaling):
            if place.get("partial_rotary_factor", 1.0) not in (1, None):
                raise D2QError("config.json: a partial_rotary_factor other than 1 isn't supported")

    def _refuse_unsupported(self) -> None:
        config = self.config
        if config.get("quantization_config"):
            raise D2QError(
                "config.json has a quantization_config: the checkpoint is quantized already; convert the original one"
            )
        if config.get("hidden_act", "silu") != "silu":
            raise D2QError(f"config.json: the activation {config['hidden_act']!r} isn't supported, only silu is")
        layer_types = config.get("layer_types") or []
        sliding = isinstance(layer_types, Iterable) and any(kind != "full_attention" for kind in layer_types)
        if config.get("use_sliding_window") or sliding:
            raise D2QError("config.json: the model uses sliding-window attention, which isn't supported yet")
        if config.get("is_causal") is False:
            raise D2QError("config.json: the model isn't causal (is_causal is false), so it isn't a text generator")

    def _int(self, key: str, *, default: int | None = None, maximum: int = 2**31 - 1) -> int:
        value = self.config.get(key)
        if value is None:
            value = default
        if value is None:
            raise D2QError(f"config.json has no {key}")
        if type(value) is not int or not 0 < value <= maximum:
            raise D2QError(f"config.json: {key} must be a whole number from 1 to {maximum}, not {value!r}")
        return value

    def _float(self, key: str, *, default: float) -> float:
        value = self.config.get(key)
        return positive_float(key, default if value is None else value)

    def _flag(self, key: str) -> bool:
        value = self.config.get(key)
        if value not in (None, True, False):
            raise D2QError(f"config.json: {key} must be true or false, not {value!r}")
        return value is True


def positive_float(key: str, value: object) -> float:
    """A setting as a float.

    Raises:
        D2QError: it isn't a finite number above zero.
    """
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < float(value) < math.inf:
            return float(value)
    except OverflowError:
        pass
    raise D2QError(f"config.json: {key} must be a positive number, not {value!r}")
