"""Define what a model family is: its layers with their shapes, and how its tensors and settings are written to GGUF."""

import math
import re
from abc import ABC
from collections.abc import Iterable, Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar

import gguf
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from d2q_edge.errors import D2QError
from d2q_edge.model.families.gguf_keys import GGUFKeys
from d2q_edge.model.families.layout import LinearGroup, RoutedExperts, Sublayer
from d2q_edge.model.families.rope import RotaryEmbedding
from d2q_edge.model.families.side_inputs import SideInputs

MAX_LAYERS = 10_000  # more than any model has: a config.json must not make us build names forever
Values = npt.NDArray[Any] | torch.Tensor


class Family(RotaryEmbedding, SideInputs, ABC):
    """A decoder family, bound to one model's config; create one with `families.family_for`.

    The config sets num_layers, hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, vocab_size,
    context_length, norm_eps, tied_embeddings, and what RotaryEmbedding has.
    """

    architectures: ClassVar[tuple[str, ...]]  # the entries of config.json's `architectures` that this family handles
    # config.json's `model_type`, by which transformers chooses the code; empty where it isn't checked.
    model_type: ClassVar[str] = ""
    gguf_arch: ClassVar[str]  # llama.cpp's name of the architecture, the prefix of its GGUF keys
    # Whether llama.cpp's converter records the tokenizer's add_prefix_space for this architecture.
    records_space_prefix: ClassVar[bool] = False
    # Whether llama.cpp's converter writes the head size even if config.json has no head_dim.
    records_default_head_dim: ClassVar[bool] = True
    # Key and value in config.json of the only activation that llama.cpp has for this architecture.
    activation: ClassVar[tuple[str, str]] = ("hidden_act", "silu")
    records_no_experts: ClassVar[bool] = False  # Whether it writes their number even if there are none.
    norm_offset: ClassVar[float] = 0.0  # added to a norm's weight before it multiplies
    qk_norms: ClassVar[bool] = False  # whether q and k are normalized per head
    # Whether rotating the residual stream (quantize/rotation.py) leaves the model's function unchanged.
    can_rotate: ClassVar[bool] = True
    # Settings of config.json that llama.cpp's architecture doesn't support if they are true.
    refused_flags: ClassVar[tuple[str, ...]] = ()
    # Whether llama.cpp's architecture needs num_attention_heads * head_dim = hidden_size.
    full_width_heads: ClassVar[bool] = False

    # transformers' defaults for settings that config.json omits.
    default_norm_eps: ClassVar[float] = 1e-6
    default_kv_heads: ClassVar[int | None] = None  # None: as many as query heads
    default_head_dim: ClassVar[int | None] = None  # None: hidden_size / query heads
    tied_by_default: ClassVar[bool] = False
    # Keys of config.json: of the norms' epsilon, and of tied embeddings, the first of which that is there counts.
    norm_eps_key: ClassVar[str] = "rms_norm_eps"
    tied_keys: ClassVar[tuple[str, ...]] = ("tie_word_embeddings",)

    embedding_scale: float = 1.0  # factor of the embeddings in front of the first block
    residual_scale: float = 1.0  # factor of what every sublayer adds to the residual stream
    logit_scale: float = 1.0  # factor of what the head puts out
    logit_cap: float = 0.0  # logits become cap * tanh(logits / cap); 0 leaves them as they are
    num_experts: int = 0  # experts of every block that has them; 0 where all have an ordinary MLP
    experts_per_token: int = 0  # experts that a token is routed to (top_k)
    expert_parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")  # names of an expert's layers
    scan_width: int = 0  # numbers per token that a state-space layer has in memory beside what layers put out
    ignored_window: int | None = None  # tokens that the model's attention is limited to, but llama.cpp's isn't

    # The block's layout, where all blocks are alike; see block_groups and block_sublayers.
    linear_groups: tuple[LinearGroup, ...] = (
        LinearGroup("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        LinearGroup(None, ("self_attn.o_proj",), absorber="self_attn.v_proj"),
        LinearGroup("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        LinearGroup(None, ("mlp.down_proj",), absorber="mlp.up_proj"),
    )
    sublayers: tuple[Sublayer, ...] = (
        Sublayer("self_attn", "input_layernorm"),
        Sublayer("mlp", "post_attention_layernorm"),
    )
    embedding: ClassVar[str] = "model.embed_tokens"
    final_norm: ClassVar[str] = "model.norm"
    head: ClassVar[str] = "lm_head"
    rotary: ClassVar[str] = "rotary_emb"  # in transformers' model, which may have None there

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Read the config; raise D2QError if a setting is missing or invalid, or the GGUF can't express it."""
        super().__init__(config)
        self.num_layers = self._int("num_hidden_layers", maximum=MAX_LAYERS)
        self.hidden_size = self._int("hidden_size")
        self.intermediate_size = self._feed_forward_width()
        self.num_heads = self._int("num_attention_heads")
        given = self.default_kv_heads is None or "num_key_value_heads" in config
        self.num_kv_heads = self._int("num_key_value_heads", default=self.num_heads if given else self.default_kv_heads)
        width = self.hidden_size // self.num_heads if self.hidden_size % self.num_heads == 0 else None
        self.head_dim = self._int("head_dim", default=self.default_head_dim or width)
        self.vocab_size = self._int("vocab_size")
        self.context_length = self._int("max_position_embeddings")
        self.norm_eps = self._float(self.norm_eps_key, default=self.default_norm_eps)
        tied = next((key for key in self.tied_keys if config.get(key) is not None), self.tied_keys[0])
        self.tied_embeddings = self._flag(tied, default=self.tied_by_default)
        if self.num_heads % self.num_kv_heads:
            raise D2QError(
                f"config.json: num_attention_heads ({self.num_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise D2QError(f"config.json: head_dim must be even, not {self.head_dim}")
        if self.full_width_heads and self.num_heads * self.head_dim != self.hidden_size:
            raise D2QError(
                f"config.json: {self.gguf_arch} models need num_attention_heads * head_dim = hidden_size, but this one "
                f"has {self.num_heads} * {self.head_dim} and {self.hidden_size}"
            )
        self._read_rope()
        self._refuse_unsupported()

    def block_groups(self, index: int) -> tuple[LinearGroup, ...]:
        """Return the linear groups of block `index`, in forward order."""
        return self.linear_groups

    def block_sublayers(self, index: int) -> tuple[Sublayer, ...]:
        """Return the sublayers of block `index`, in forward order."""
        return self.sublayers

    def block_experts(self, index: int) -> RoutedExperts | None:
        """Return the experts of block `index`, if it has them; they are the same in all blocks that do."""
        return None

    def block_linears(self, index: int) -> tuple[str, ...]:
        """Return all linear layers of block `index` that are quantized, in forward order, relative to the block."""
        return tuple(linear for group in self.block_groups(index) for linear in group.linears)

    def residual_readers(self, index: int) -> Mapping[str, str]:
        """Return the layers of block `index` that read the residual stream, each with the norm in front of it."""
        return {linear: group.norm for group in self.block_groups(index) if group.norm for linear in group.linears}

    def residual_writers(self, index: int) -> tuple[str, ...]:
        """Return the linear layers of block `index` whose output is added to the residual stream."""
        inner = (group for group in self.block_groups(index) if group.norm is None and not group.reads_stream)
        return tuple(linear for group in inner for linear in group.linears)

    @property
    def notes(self) -> tuple[str, ...]:
        """Return sentences that tell the user where llama.cpp deviates from the original model."""
        window = self.ignored_window
        if window is None or window >= self.context_length:
            return self._rope_notes
        return (
            *self._rope_notes,
            f"the model attends to the last {window} tokens, llama.cpp's {self.gguf_arch} to all of them: in texts of "
            f"more than {window} tokens it isn't the same model",
        )

    def state_elements(self, index: int) -> int:
        """Return the numbers, f32, of what block `index` remembers of a text in place of keys and values."""
        return 0

    def sliding_window(self, index: int) -> int | None:
        """Return the number of tokens that block `index` attends to, the current one included; None for all."""
        return self.ignored_window

    def sublayer_groups(self, index: int, sublayer: Sublayer) -> tuple[LinearGroup, ...]:
        """Return the linear groups of a sublayer of block `index`."""
        prefix = f"{sublayer.module}."
        return tuple(group for group in self.block_groups(index) if group.linears[0].startswith(prefix))

    def block_prefix(self, index: int) -> str:
        """Return the prefix that turns a name relative to block `index` into a full one."""
        return f"model.layers.{index}."

    def block_of(self, name: str) -> int | None:
        """Return the block of a tensor or module with this full name; None outside of the blocks."""
        match = re.match(re.escape(self.block_prefix(0)).replace("0", r"(\d+)", 1), name)
        return int(match[1]) if match else None

    def split_name(self, name: str) -> tuple[int | None, str]:
        """Return the block of a tensor or module and its name in it; outside of blocks None and the full name."""
        index = self.block_of(name)
        return index, name if index is None else name.removeprefix(self.block_prefix(index))

    def linear_weights(self) -> list[str]:
        """Return the full names of the weights of all blocks' linear layers, in forward order."""
        return [
            f"{self.block_prefix(i)}{linear}.weight" for i in range(self.num_layers) for linear in self.block_linears(i)
        ]

    def linear_shape(self, index: int, linear: str) -> tuple[int, int]:
        """Return (out_features, in_features) of a linear layer of block `index`; the shape of its weight."""
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

    def absorber_rows(self, index: int, absorber: str) -> npt.NDArray[np.int64]:
        """Return an absorber's rows that the columns after it are proportional to, int64 [in_features after it].

        The gated activation maps them one to one; a row of v serves its channel in all query heads of its group.
        """
        if absorber != "self_attn.v_proj":
            return np.arange(self.linear_shape(index, absorber)[0])
        rows = np.arange(self.num_kv_heads * self.head_dim).reshape(self.num_kv_heads, 1, self.head_dim)
        return rows.repeat(self.num_heads // self.num_kv_heads, axis=1).reshape(-1)

    def biased_linears(self) -> tuple[str, ...]:
        """Return the linear layers that have a bias, by their names in their blocks."""
        return ()

    def block_norms(self, index: int) -> dict[str, int]:
        """Return the norms of block `index` with their widths, relative to the block, without ".weight"."""
        sublayers = self.block_sublayers(index)
        names = [norm for sublayer in sublayers for norm in (sublayer.norm, sublayer.output_norm) if norm]
        heads = ("self_attn.q_norm", "self_attn.k_norm") if self.qk_norms else ()
        return dict.fromkeys(names, self.hidden_size) | dict.fromkeys(heads, self.head_dim)

    def block_routers(self, index: int) -> dict[str, tuple[int, int]]:
        """Return the routers of block `index` with the shapes of their weights, named as in `block_norms`."""
        return {}

    def block_kept_linears(self, index: int) -> dict[str, tuple[int, int]]:
        """Return linear layers of block `index` that aren't quantized, but read what quantized layers read.

        With the shapes of their weights; `residual_readers` has the norms in front of them. Unlike those of routers,
        their weights have a file's stock type if all matrices have it.
        """
        return {}

    def block_constants(self, index: int) -> dict[str, tuple[int, ...]]:
        """Return what else block `index` has and nothing quantizes, such as a convolution's kernel: names and shapes.

        The names are relative to the block, with ".weight" where they have it.
        """
        return {}

    def stays_float(self, hf_name: str) -> bool:
        """Return whether a tensor of two or more dimensions is f32 in the file whatever the file's type."""
        index, inner = self.split_name(hf_name)
        if index is None:
            return False
        return inner.removesuffix(".weight") in self.block_routers(index) or inner in self.block_constants(index)

    @property
    def stacks(self) -> Mapping[str, tuple[str, ...]]:
        """Return the GGUF tensors [parts, out, in] that stack several weights: name to parts, in the file's order.

        The name is one that `gguf_name` accepts; the checkpoint has only the parts. All parts must be of one type.
        """
        return {}

    def parameters(self) -> tuple[int, int, int, int]:
        """Return four counts for gguf-py's size label: all weights, those outside of stacks, those of one part of every
        stack, and the parts of a stack."""
        sizes = {name: math.prod(shape) for name, shape in self.tensor_shapes().items()}
        stacked = sum(sizes[part] for parts in self.stacks.values() for part in parts)
        one_part = sum(sizes[parts[0]] for parts in self.stacks.values())
        total = sum(sizes.values())
        return total, total - stacked, one_part, self.num_experts

    def tensor_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return name and shape of every tensor of a complete checkpoint."""
        return self._tensor_shapes

    @cached_property
    def _tensor_shapes(self) -> Mapping[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {f"{self.embedding}.weight": (self.vocab_size, self.hidden_size)}
        for index in range(self.num_layers):
            prefix = self.block_prefix(index)
            linears = self.block_linears(index)
            for linear in linears:
                shapes[f"{prefix}{linear}.weight"] = self.linear_shape(index, linear)
            for linear in self.biased_linears():
                if linear in linears:
                    shapes[f"{prefix}{linear}.bias"] = self.linear_shape(index, linear)[:1]
            for norm, width in self.block_norms(index).items():
                shapes[f"{prefix}{norm}.weight"] = (width,)
            for kept, kept_shape in (self.block_routers(index) | self.block_kept_linears(index)).items():
                shapes[f"{prefix}{kept}.weight"] = kept_shape
            for name, shape in self.block_constants(index).items():
                shapes[f"{prefix}{name}"] = shape
        shapes |= self.outer_tensors() | {f"{self.final_norm}.weight": (self.hidden_size,)}
        if not self.tied_embeddings:
            shapes[f"{self.head}.weight"] = (self.vocab_size, self.hidden_size)
        return MappingProxyType(shapes)

    def export_shape(self, hf_name: str) -> tuple[int, ...]:
        """Return a tensor's shape in the file, where depthwise kernels [channels, 1, taps] have two dimensions."""
        shape = self.tensor_shapes()[hf_name]
        return (shape[0], *shape[2:]) if len(shape) == 3 and shape[1] == 1 else shape

    def gguf_name(self, hf_name: str) -> str:
        """Return a tensor's GGUF name, such as "blk.0.attn_q.weight"; raise KeyError if the architecture has none."""
        name = self._gguf_names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise KeyError(hf_name)
        return str(name)

    def export_rows(self, hf_name: str, array: Values) -> Values:
        """Reorder the rows (first axis) of a weight, a bias or packed rows of any dtype for the file."""
        return array

    def export_values(self, hf_name: str, array: Values) -> Values:
        """Convert a float tensor's values for the file, whose norm weights (float32) include `norm_offset`."""
        return array + self.norm_offset if self._has_offset(hf_name) else array

    def arranged(self, hf_name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Put the columns of a weight of the checkpoint into the order of the file, which `adapt_block` is for."""
        return tensor

    def adapt_block(self, index: int, block: nn.Module) -> None:
        """Make transformers' module of block `index` compute with weights that are `arranged`, in place."""

    def import_rows(self, hf_name: str, array: Values) -> Values:
        """Undo `export_rows`."""
        order = np.asarray(self.export_rows(hf_name, np.arange(array.shape[0])))
        return array if (np.diff(order) == 1).all() else array[np.argsort(order)]

    def import_values(self, hf_name: str, array: Values) -> Values:
        """Undo `export_values`."""
        return array - self.norm_offset if self._has_offset(hf_name) else array

    def extra_tensors(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return the tensors that the file needs and the checkpoint doesn't have, by GGUF name."""
        return {}

    def add_metadata(self, writer: gguf.GGUFWriter, file_type: int) -> None:
        """Add the `ARCH.*` keys and general.file_type, in the order of llama.cpp's converter."""
        writer.add_block_count(self.num_layers)
        writer.add_context_length(self.context_length)
        writer.add_embedding_length(self.hidden_size)
        writer.add_feed_forward_length(self._recorded_width())
        writer.add_head_count(self.num_heads)
        writer.add_head_count_kv(self._recorded_kv_heads())
        self._add_rope(writer)
        writer.add_layer_norm_rms_eps(self.norm_eps)
        if self.num_experts or self.records_no_experts:
            writer.add_expert_count(self.num_experts)
            writer.add_expert_used_count(self.experts_per_token)
        if self._records_head_dim():
            writer.add_key_length(self._recorded_head_dim())
            writer.add_value_length(self._recorded_head_dim())
        writer.add_file_type(file_type)

    @classmethod
    def import_config(cls, keys: GGUFKeys) -> dict[str, Any]:
        """Undo `add_metadata`: return the entries of config.json that decide what the model in a GGUF file computes.

        Raises:
            D2QError: a key is missing or invalid. `family_for` refuses what else can't be converted.
        """
        config = keys.common_config()
        config |= {"architectures": [cls.architectures[0]], "model_type": cls.model_type}
        config[cls.activation[0]] = cls.activation[1]
        if cls.records_default_head_dim or "attention.key_length" in keys:
            config["head_dim"] = keys.head_dim
        return config

    def _feed_forward_width(self) -> int:
        return self._int("intermediate_size")

    def _recorded_kv_heads(self) -> int | list[int]:
        """Return the number of key-value heads, or those of every block."""
        return self.num_kv_heads

    def _recorded_width(self) -> int | list[int]:
        """Return the width of the feed-forward layers, or that of every block."""
        return self.intermediate_size

    def _recorded_head_dim(self) -> int:
        return self.head_dim

    def _records_head_dim(self) -> bool:
        return self.records_default_head_dim or self.config.get("head_dim") is not None

    def _has_offset(self, hf_name: str) -> bool:
        index, inner = self.split_name(hf_name.removesuffix(".weight"))
        is_norm = inner == self.final_norm if index is None else inner in self.block_norms(index)
        return bool(self.norm_offset) and is_norm

    @cached_property
    def _gguf_names(self) -> Any:
        arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == self.gguf_arch)
        return gguf.get_tensor_name_map(arch, self.num_layers)

    def _refuse_unsupported(self) -> None:
        config = self.config
        if self.model_type and config.get("model_type", self.model_type) != self.model_type:
            raise D2QError(
                f"config.json contradicts itself: the architecture {config['architectures'][0]} has the model_type "
                f"{self.model_type!r}, not {config['model_type']!r}"
            )
        key, activation = self.activation
        if config.get(key, activation) != activation:
            raise D2QError(f"config.json: the activation {config[key]!r} isn't supported, only {activation} is")
        if config.get("is_causal") is False:
            raise D2QError("config.json: the model isn't causal (is_causal is false), so it isn't a text generator")
        for flag in self.refused_flags:
            if self._flag(flag):
                raise D2QError(f"config.json: {flag} is set, which llama.cpp's {self.gguf_arch} doesn't support")
        self._check_attention()

    def _check_attention(self) -> None:
        """Refuse layers that don't attend to all earlier tokens."""
        layer_types = self.config.get("layer_types") or []
        sliding = isinstance(layer_types, Iterable) and any(kind != "full_attention" for kind in layer_types)
        if self.config.get("use_sliding_window") or sliding:
            raise D2QError(
                f"config.json: the model uses sliding-window attention, which llama.cpp's {self.gguf_arch} doesn't have"
            )
