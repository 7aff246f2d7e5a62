"""Define what families with Mamba-2 have in common: some of their blocks have it in place of attention.

llama.cpp: src/models/mamba-base.cpp, build_mamba2_layer; conversion/mamba.py, Mamba2Model. in_proj puts out a gate, x,
B, C and a time step for each head, which the file has in one tensor. The columns of out_proj are proportional to the
weight of Mamba's norm. The convolution, A_log, D, dt_bias and that norm are not quantized.
"""

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

MODULE = "mamba"
MAMBA, ATTENTION = (MODULE, "linear_attention"), ("attention", "full_attention")
"""Names of the two kinds of blocks in layer_types: in published files, and in those that transformers 5 saves."""
CHUNK = 64
"""Tokens that transformers' scan takes at a time. The published 256 give the same, and take four times the memory."""
NO_TIME_LIMIT = (None, [0, float("inf")], [0, {"__float__": "Infinity"}])
"""time_step_limit where it limits nothing; the last is transformers' spelling of infinity in JSON."""
SCANNED = 6
"""Numbers per token, head and token of a chunk that the scan has in memory."""


class Mamba2(Family):
    """A family some of whose blocks have Mamba-2."""

    def block_groups(self, index: int) -> tuple[LinearGroup, ...]:
        groups = super().block_groups(index)
        if not self.has_mamba[index]:
            return groups
        return (
            LinearGroup("input_layernorm", (f"{MODULE}.in_proj",)),
            LinearGroup(None, (f"{MODULE}.out_proj",), absorber=f"{MODULE}.norm"),
            *(group for group in groups if not group.linears[0].startswith("self_attn.")),
        )

    def block_sublayers(self, index: int) -> tuple[Sublayer, ...]:
        attention, mlp = self.sublayers
        return (Sublayer(MODULE, attention.norm) if self.has_mamba[index] else attention), mlp

    def block_constants(self, index: int) -> dict[str, tuple[int, ...]]:
        if not self.has_mamba[index]:
            return {}
        return {
            **dict.fromkeys((f"{MODULE}.A_log", f"{MODULE}.D", f"{MODULE}.dt_bias"), (self.mamba_heads,)),
            f"{MODULE}.conv1d.weight": (self.conv_width, 1, self.taps),
            f"{MODULE}.conv1d.bias": (self.conv_width,),
            f"{MODULE}.norm.weight": (self.inner_width,),
        }

    def state_elements(self, index: int) -> int:
        state = (self.taps - 1) * self.conv_width + self.inner_width * self.state_size
        return state if self.has_mamba[index] else 0

    def linear_shape(self, linear: str) -> tuple[int, int]:
        own = {
            f"{MODULE}.in_proj": (self.inner_width + self.conv_width + self.mamba_heads, self.hidden_size),
            f"{MODULE}.out_proj": (self.hidden_size, self.inner_width),
        }
        return own[linear] if linear in own else super().linear_shape(linear)

    def absorber_rows(self, absorber: str) -> npt.NDArray[np.int64]:
        return np.arange(self.inner_width) if absorber == f"{MODULE}.norm" else super().absorber_rows(absorber)

    def adapt_block(self, index: int, block: nn.Module) -> None:
        if self.has_mamba[index]:
            setattr(block.get_submodule(MODULE), "chunk_size", CHUNK)  # noqa: B010

    def export_shape(self, hf_name: str) -> tuple[int, ...]:
        shape = super().export_shape(hf_name)
        if hf_name.endswith((f"{MODULE}.A_log", f"{MODULE}.D")):
            return (*shape, 1)
        return (self.groups, shape[0] // self.groups) if hf_name.endswith(f"{MODULE}.norm.weight") else shape

    def gguf_name(self, hf_name: str) -> str:
        return super().gguf_name(hf_name.replace(f"{MODULE}.dt_bias", f"{MODULE}.dt_proj.bias"))

    def export_values(self, hf_name: str, array: Values) -> Values:
        if isinstance(array, torch.Tensor) and hf_name.endswith(f"{MODULE}.A_log"):
            return -torch.exp(array)
        return super().export_values(hf_name, array)

    def import_values(self, hf_name: str, array: Values) -> Values:
        """Undo `export_values`, up to rounding for A_log."""
        if isinstance(array, torch.Tensor) and hf_name.endswith(f"{MODULE}.A_log"):
            return torch.log(-array)
        return super().import_values(hf_name, array)

    def add_mamba_keys(self, writer: gguf.GGUFWriter) -> None:
        """Add the `ARCH.ssm.*` keys."""
        writer.add_ssm_conv_kernel(self.taps)
        writer.add_ssm_state_size(self.state_size)
        writer.add_ssm_group_count(self.groups)
        writer.add_ssm_inner_size(self.inner_width)
        writer.add_ssm_time_step_rank(self.mamba_heads)

    @classmethod
    def import_config(cls, keys: GGUFKeys) -> dict[str, Any]:
        config = super().import_config(keys)
        counts = keys.value("attention.head_count_kv", None)
        heads, width = keys.whole("ssm.time_step_rank"), keys.whole("ssm.inner_size")
        return config | {
            "layer_types": [ATTENTION[0] if each else MAMBA[0] for each in counts] if isinstance(counts, list) else [],
            "mamba_d_conv": keys.whole("ssm.conv_kernel"),
            "mamba_d_head": width // max(heads, 1),
            "mamba_d_state": keys.whole("ssm.state_size"),
            "mamba_n_groups": keys.whole("ssm.group_count"),
            "mamba_n_heads": heads,
            "mamba_expand": width // max(config["hidden_size"], 1),
        }

    def _recorded_kv_heads(self) -> list[int]:
        return [0 if mamba else self.num_kv_heads for mamba in self.has_mamba]

    def _check_attention(self) -> None:
        """Read what Mamba-2 is like, and which blocks have it."""
        types = self.config.get("layer_types")
        if not isinstance(types, list) or [kind in (*MAMBA, *ATTENTION) for kind in types] != [True] * self.num_layers:
            raise D2QError(
                f"config.json: layer_types must name the kind of all {self.num_layers} blocks, each one of "
                f"{MAMBA[0]}, {ATTENTION[0]}"
            )
        self.has_mamba = [kind in MAMBA for kind in types]
        self.taps = self._int("mamba_d_conv", default=4)
        self.state_size = self._int("mamba_d_state", default=256)
        self.groups = self._int("mamba_n_groups", default=1)
        self.mamba_heads = self._int("mamba_n_heads", default=128)
        self.inner_width = 2 * self.hidden_size
        if self._int("mamba_expand", default=2) != 2:
            raise D2QError(f"config.json: mamba_expand isn't 2, the only one that llama.cpp's {self.gguf_arch} has")
        width = self.inner_width // self.mamba_heads if self.config.get("mamba_d_head") == "auto" else None
        width = width or self._int("mamba_d_head", default=self.inner_width // self.mamba_heads)
        if width * self.mamba_heads != self.inner_width or self.mamba_heads % self.groups:
            raise D2QError(
                "config.json: mamba_n_heads must be a multiple of mamba_n_groups, and times mamba_d_head be "
                "twice the hidden_size"
            )
        self.conv_width = self.inner_width + 2 * self.groups * self.state_size
        self.scan_width = SCANNED * CHUNK * self.mamba_heads
        if not self._flag("mamba_conv_bias", default=True):
            raise D2QError(f"config.json: mamba_conv_bias is false, but llama.cpp's {self.gguf_arch} has that bias")
        if self.config.get("time_step_limit") not in NO_TIME_LIMIT:
            raise D2QError(f"config.json: time_step_limit is set, which llama.cpp's {self.gguf_arch} doesn't have")
