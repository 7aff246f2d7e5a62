"""Define what families with Gated DeltaNet have in common: some of their blocks have it in place of attention.

llama.cpp: conversion/qwen.py, Qwen3NextModel and _LinearAttentionVReorderBase. Where DeltaNet has more value heads than
key heads, the file has them in another order: transformers puts the value heads of a key head next to each other,
llama.cpp as many places apart as there are key heads. Rows are moved when the file is written. The columns of out_proj
are moved before they are quantized (`arranged`), and so is what it reads (`adapt_block`).

The columns of out_proj are proportional to the weight of DeltaNet's norm, which all heads share. in_proj_a and
in_proj_b, one row per head, decide how long the state lasts; they and the convolution's kernel are not quantized.
"""

from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from d2q_edge.errors import D2QError
from d2q_edge.model.families.base import Family, Values
from d2q_edge.model.families.gguf_keys import GGUFKeys
from d2q_edge.model.families.layout import LinearGroup, Sublayer

LINEAR, FULL = "linear_attention", "full_attention"
MODULE = "linear_attn"
KEPT = (f"{MODULE}.in_proj_b", f"{MODULE}.in_proj_a")


class GatedDeltaNet(Family):
    """A family some of whose blocks have Gated DeltaNet."""

    def block_groups(self, index: int) -> tuple[LinearGroup, ...]:
        if self.layer_types[index] == FULL:
            return self.linear_groups
        return (
            LinearGroup("input_layernorm", (f"{MODULE}.in_proj_qkv", f"{MODULE}.in_proj_z")),
            LinearGroup(None, (f"{MODULE}.out_proj",), absorber=f"{MODULE}.norm"),
            *(group for group in self.linear_groups if not group.linears[0].startswith("self_attn.")),
        )

    def block_sublayers(self, index: int) -> tuple[Sublayer, ...]:
        attention, mlp = self.sublayers
        return (attention if self.layer_types[index] == FULL else Sublayer(MODULE, attention.norm)), mlp

    def block_norms(self, index: int) -> dict[str, int]:
        norms = super().block_norms(index)
        return {name: norms[name] for name in norms if self.layer_types[index] == FULL or "." not in name}

    def block_kept_linears(self, index: int) -> dict[str, tuple[int, int]]:
        return dict.fromkeys(KEPT if self.layer_types[index] == LINEAR else (), (self.value_heads, self.hidden_size))

    def residual_readers(self, index: int) -> Mapping[str, str]:
        kept = dict.fromkeys(self.block_kept_linears(index), "input_layernorm")
        return {**super().residual_readers(index), **kept}

    def block_constants(self, index: int) -> dict[str, tuple[int, ...]]:
        if self.layer_types[index] == FULL:
            return {}
        return {
            f"{MODULE}.A_log": (self.value_heads,),
            f"{MODULE}.conv1d.weight": (2 * self.key_width + self.value_width, 1, self.taps),
            f"{MODULE}.dt_bias": (self.value_heads,),
            f"{MODULE}.norm.weight": (self.state_size,),
        }

    def state_elements(self, index: int) -> int:
        if self.layer_types[index] == FULL:
            return 0
        return (self.taps - 1) * (2 * self.key_width + self.value_width) + self.value_width * self.state_size

    def linear_shape(self, index: int, linear: str) -> tuple[int, int]:
        own = {
            f"{MODULE}.in_proj_qkv": (2 * self.key_width + self.value_width, self.hidden_size),
            f"{MODULE}.in_proj_z": (self.value_width, self.hidden_size),
            f"{MODULE}.out_proj": (self.hidden_size, self.value_width),
        }
        return own[linear] if linear in own else super().linear_shape(index, linear)

    def absorber_rows(self, index: int, absorber: str) -> npt.NDArray[np.int64]:
        if absorber == f"{MODULE}.norm":
            return np.tile(np.arange(self.state_size), self.value_heads)
        return super().absorber_rows(index, absorber)

    def arranged(self, hf_name: str, tensor: torch.Tensor) -> torch.Tensor:
        if hf_name.endswith(f"{MODULE}.out_proj.weight"):
            return tensor.index_select(1, torch.from_numpy(self._places(self.state_size)).to(tensor.device))
        return tensor

    def adapt_block(self, index: int, block: nn.Module) -> None:
        """Let DeltaNet's norm put the heads into the order in which `arranged` out_proj reads them."""
        if self.layer_types[index] == FULL:
            return
        # Blocks are loaded in inference mode, whose tensors can't take part in a backward pass.
        with torch.inference_mode(False):
            order = torch.from_numpy(self._places(1))

        def reorder(_module: nn.Module, _arguments: Any, output: torch.Tensor) -> torch.Tensor:
            heads: torch.Tensor = output.unflatten(0, (-1, len(order)))
            with torch.inference_mode(False):
                places = order.to(output.device)
            return heads[:, places].flatten(0, 1)

        block.get_submodule(f"{MODULE}.norm").register_forward_hook(reorder)

    def gguf_name(self, hf_name: str) -> str:
        return super().gguf_name(hf_name.replace(f"{MODULE}.dt_bias", f"{MODULE}.dt_proj.bias"))

    def export_rows(self, hf_name: str, array: Values) -> Values:
        """Move the rows of the value heads, which come last."""
        inner = self.split_name(hf_name)[1].removesuffix(".weight")
        sizes = dict.fromkeys(("in_proj_qkv", "conv1d", "in_proj_z"), self.state_size)
        sizes |= dict.fromkeys(("in_proj_a", "in_proj_b", "A_log", "dt_bias"), 1)
        size = sizes.get(inner.removeprefix(f"{MODULE}."))
        if size is None or not inner.startswith(MODULE):
            return array
        order = self._places(size)
        before = array.shape[0] - len(order)
        return array[np.concatenate([np.arange(before), before + order])]

    def export_values(self, hf_name: str, array: Values) -> Values:
        if not isinstance(array, torch.Tensor):
            return super().export_values(hf_name, array)
        if hf_name.endswith(f"{MODULE}.A_log"):
            return -torch.exp(array)
        return super().export_values(hf_name, self.arranged(hf_name, array))

    def import_values(self, hf_name: str, array: Values) -> Values:
        """Undo `export_values`, up to rounding for A_log."""
        if isinstance(array, torch.Tensor) and hf_name.endswith(f"{MODULE}.A_log"):
            return torch.log(-array)
        if hf_name.endswith(f"{MODULE}.out_proj.weight"):
            return array[:, np.argsort(self._places(self.state_size))]
        return super().import_values(hf_name, array)

    def add_metadata(self, writer: gguf.GGUFWriter, file_type: int) -> None:
        super().add_metadata(writer, file_type)
        writer.add_ssm_conv_kernel(self.taps)
        writer.add_ssm_state_size(self.state_size)
        writer.add_ssm_group_count(self.key_heads)
        writer.add_ssm_time_step_rank(self.value_heads)
        writer.add_ssm_inner_size(self.value_width)
        recurrent = [kind == LINEAR for kind in self.layer_types]
        writer.add_array(f"{self.gguf_arch}.attention.recurrent_layers", recurrent)
        writer.add_full_attention_interval(self.interval)

    @classmethod
    def import_config(cls, keys: GGUFKeys) -> dict[str, Any]:
        config = super().import_config(keys)
        interval = keys.whole("full_attention_interval", 4)
        recurrent = keys.value(
            "attention.recurrent_layers",
            [(index + 1) % max(interval, 1) != 0 for index in range(config["num_hidden_layers"])],
        )
        heads = keys.whole("ssm.time_step_rank")
        return config | {
            "layer_types": [LINEAR if each else FULL for each in recurrent] if isinstance(recurrent, list) else [],
            "full_attention_interval": interval,
            "linear_conv_kernel_dim": keys.whole("ssm.conv_kernel"),
            "linear_key_head_dim": keys.whole("ssm.state_size"),
            "linear_value_head_dim": keys.whole("ssm.inner_size") // max(heads, 1),
            "linear_num_key_heads": keys.whole("ssm.group_count"),
            "linear_num_value_heads": heads,
        }

    def _places(self, size: int) -> npt.NDArray[np.int64]:
        """Return where the rows of value heads, `size` of each, come from in the file's order."""
        heads = np.arange(self.value_heads).reshape(self.key_heads, -1).T.reshape(-1, 1)
        return (heads * size + np.arange(size)).reshape(-1)

    def _check_attention(self) -> None:
        """Read what DeltaNet is like, and which blocks have it."""
        self.taps = self._int("linear_conv_kernel_dim", default=4)
        self.state_size = self._int("linear_value_head_dim", default=128)
        self.key_heads = self._int("linear_num_key_heads", default=16)
        self.value_heads = self._int("linear_num_value_heads", default=32)
        self.key_width, self.value_width = self.state_size * self.key_heads, self.state_size * self.value_heads
        if self._int("linear_key_head_dim", default=128) != self.state_size or self.value_heads % self.key_heads:
            raise D2QError(
                f"config.json: llama.cpp's {self.gguf_arch} needs linear_key_head_dim = linear_value_head_dim, and "
                "linear_num_value_heads to be a multiple of linear_num_key_heads"
            )
        if self.value_width % 32:
            raise D2QError("config.json: linear_num_value_heads * linear_value_head_dim must be a multiple of 32")
        self.interval = self._int("full_attention_interval", default=4)
        types = self.config.get("layer_types")
        if types is None:
            types = [FULL if (index + 1) % self.interval == 0 else LINEAR for index in range(self.num_layers)]
        if not isinstance(types, list) or [kind in (LINEAR, FULL) for kind in types] != [True] * self.num_layers:
            raise D2QError(
                f"config.json: layer_types must name the attention of all {self.num_layers} blocks, each one of "
                f"{LINEAR}, {FULL}"
            )
        self.layer_types: list[str] = types
