"""What families with a mixture of experts have in common: in every block a router and experts, each a gated mlp.

Checkpoints have the tensors of every expert by itself (mlp.experts.N.gate_proj.weight), llama.cpp's files one stack
of all experts for each of the three layers (blk.N.ffn_gate_exps.weight). The router, mlp.gate, reads what the experts
read and stays f32.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any

from d2q_edge.errors import D2QError
from d2q_edge.model.families.base import Family
from d2q_edge.model.families.layout import LinearGroup

ROUTER = "mlp.gate"
"""The router's name in its block."""
EXPERTS = "mlp.experts."
"""What the names of experts' layers in their block begin with."""
NORM = "post_attention_layernorm"
"""The norm that router and experts read."""
# llama.cpp's own limit.
MAX_EXPERTS = 1024
# More than any model has, in all blocks together: Qwen3-235B-A22B has 12032, Kimi K2 23040.
MAX_ALL_EXPERTS = 100_000


class MixtureOfExperts(Family):
    """A family whose blocks all have experts.

    Attributes set from the config: num_experts, experts_per_token, expert_width (the experts' intermediate size).
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        attention = [group for group in type(self).linear_groups if group.linears[0].startswith("self_attn.")]
        experts = [expert_linears(number) for number in range(self.num_experts)]
        self.linear_groups = (
            *attention,
            LinearGroup(NORM, tuple(name for gate, up, _ in experts for name in (gate, up))),
            *(LinearGroup(None, (down,), source=up) for _, up, down in experts),
        )

    @property
    @abstractmethod
    def renormalizes(self) -> bool:
        """Whether llama.cpp's graph makes the chosen experts' weights sum up to one."""

    @property
    def residual_readers(self) -> Mapping[str, str]:
        return {**super().residual_readers, ROUTER: NORM}

    @cached_property
    def _stacks(self) -> Mapping[str, tuple[str, ...]]:
        prefixes = [f"{self.block_prefix(index)}mlp.experts" for index in range(self.num_layers)]
        return MappingProxyType(
            {
                f"{prefix}.{part}.weight": tuple(f"{prefix}.{i}.{part}.weight" for i in range(self.num_experts))
                for prefix in prefixes
                for part in ("down_proj", "gate_proj", "up_proj")
            }
        )

    @property
    def stacks(self) -> Mapping[str, tuple[str, ...]]:
        return self._stacks

    def linear_shape(self, linear: str) -> tuple[int, int]:
        kind = linear.rpartition(".")[2]
        if not linear.startswith(EXPERTS):
            return super().linear_shape(linear)
        wide = self.expert_width, self.hidden_size
        return wide[::-1] if kind == "down_proj" else wide

    def block_routers(self) -> dict[str, tuple[int, int]]:
        return {ROUTER: (self.num_experts, self.hidden_size)}

    def gguf_name(self, hf_name: str) -> str:
        """The GGUF name of a tensor; for one of an expert that of the stack it belongs to."""
        return super().gguf_name(re.sub(r"\.experts\.\d+\.", ".experts.", hf_name, count=1))

    def _refuse_unsupported(self) -> None:
        super()._refuse_unsupported()
        names = [name for name in ("num_experts", "num_local_experts") if self.config.get(name) is not None]
        if len({self.config[name] for name in names}) > 1:
            raise D2QError("config.json: num_experts and num_local_experts contradict each other")
        self.num_experts = self._int((*names, "num_experts")[0], maximum=MAX_EXPERTS)
        self.experts_per_token = self._int("num_experts_per_tok", maximum=self.num_experts)
        self.expert_width = self._read_expert_width()
        if self.num_layers * self.num_experts > MAX_ALL_EXPERTS:
            raise D2QError(
                f"config.json speaks of {self.num_layers} blocks of {self.num_experts} experts, more than any model has"
            )
        self._refuse_flags(("attention_bias",), f"llama.cpp's {self.gguf_arch} has no bias on the output layer")
        if self._flag("norm_topk_prob") != self.renormalizes:
            raise D2QError(
                f"config.json: norm_topk_prob is {str(not self.renormalizes).lower()}, but llama.cpp's "
                f"{self.gguf_arch} always computes as if it were {str(self.renormalizes).lower()}"
            )

    def _read_expert_width(self) -> int:
        return self.intermediate_size


def expert_linears(number: int) -> tuple[str, str, str]:
    """The names of an expert's layers in its block: gate, up, down."""
    gate, up, down = (f"{EXPERTS}{number}.{part}_proj" for part in ("gate", "up", "down"))
    return gate, up, down
