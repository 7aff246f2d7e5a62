"""Define what Mixture-of-Experts families have in common: every block has a router and experts, each a gated MLP.

Checkpoints have separate tensors for every expert (mlp.experts.N.gate_proj.weight), GGUF files one stack of all experts
for each of the three layers (blk.N.ffn_gate_exps.weight). The router, mlp.gate, reads the same input as the experts and
stays f32.
"""

import re
from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar

from d2q_edge.errors import D2QError
from d2q_edge.model.families.base import Family
from d2q_edge.model.families.gguf_keys import GGUFKeys
from d2q_edge.model.families.layout import LinearGroup

ROUTER = "mlp.gate"  # the router's name relative to its block
EXPERTS = "mlp.experts."  # the prefix of the experts' layers, relative to their block
NORM = "post_attention_layernorm"  # the norm in front of router and experts
MAX_EXPERTS = 1024  # llama.cpp's limit
MAX_ALL_EXPERTS = 100_000  # more than any model has in all blocks together: Qwen3-235B-A22B has 12032, Kimi K2 23040


class MixtureOfExperts(Family):
    """A family whose blocks all have experts; the config also sets expert_width, their intermediate size."""

    refused_flags: ClassVar[tuple[str, ...]] = ("attention_bias",)
    expert_width_key: ClassVar[str] = "intermediate_size"  # key in config.json of the experts' intermediate size
    normalizes_top_k: ClassVar[bool]
    """Whether llama.cpp's graph normalizes the weights of the chosen experts to a sum of one."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        attention = [group for group in type(self).linear_groups if group.linears[0].startswith("self_attn.")]
        experts = [expert_linears(number) for number in range(self.num_experts)]
        self.linear_groups = (
            *attention,
            LinearGroup(NORM, tuple(name for gate, up, _ in experts for name in (gate, up))),
            *(LinearGroup(None, (down,), absorber=up) for _, up, down in experts),
        )

    def residual_readers(self, index: int) -> Mapping[str, str]:
        return {**super().residual_readers(index), ROUTER: NORM}

    @cached_property
    def stacks(self) -> Mapping[str, tuple[str, ...]]:
        stacks = {}
        for prefix in (f"{self.block_prefix(index)}{EXPERTS}" for index in range(self.num_layers)):
            for part in ("down_proj", "gate_proj", "up_proj"):
                parts = tuple(f"{prefix}{number}.{part}.weight" for number in range(self.num_experts))
                stacks[f"{prefix}{part}.weight"] = parts
        return MappingProxyType(stacks)

    def linear_shape(self, index: int, linear: str) -> tuple[int, int]:
        if not linear.startswith(EXPERTS):
            return super().linear_shape(index, linear)
        wide = self.expert_width, self.hidden_size
        return wide[::-1] if linear.endswith(".down_proj") else wide

    def block_routers(self, index: int) -> dict[str, tuple[int, int]]:
        return {ROUTER: (self.num_experts, self.hidden_size)}

    def gguf_name(self, hf_name: str) -> str:
        """Return the GGUF name of a tensor; for an expert's weight, that of its stack."""
        return super().gguf_name(re.sub(r"\.experts\.\d+\.", ".experts.", hf_name, count=1))

    @classmethod
    def import_config(cls, keys: GGUFKeys) -> dict[str, Any]:
        config = super().import_config(keys)
        config["num_experts"] = keys.whole("expert_count")
        config["num_experts_per_tok"] = keys.whole("expert_used_count")
        config["norm_topk_prob"] = cls.normalizes_top_k
        return config

    def _refuse_unsupported(self) -> None:
        super()._refuse_unsupported()
        names = [name for name in ("num_experts", "num_local_experts") if self.config.get(name) is not None]
        if len({self.config[name] for name in names}) > 1:
            raise D2QError("config.json: num_experts and num_local_experts contradict each other")
        self.num_experts = self._int((*names, "num_experts")[0], maximum=MAX_EXPERTS)
        self.experts_per_token = self._int("num_experts_per_tok", maximum=self.num_experts)
        self.expert_width = self._int(self.expert_width_key)
        if self.num_layers * self.num_experts > MAX_ALL_EXPERTS:
            raise D2QError(
                f"config.json speaks of {self.num_layers} blocks of {self.num_experts} experts, more than any model has"
            )
        if self._flag("norm_topk_prob") != self.normalizes_top_k:
            raise D2QError(
                f"config.json: norm_topk_prob is {str(not self.normalizes_top_k).lower()}, but llama.cpp's "
                f"{self.gguf_arch} always computes as if it were {str(self.normalizes_top_k).lower()}"
            )


def expert_linears(number: int) -> tuple[str, str, str]:
    """Return the names of an expert's gate, up and down, relative to the block."""
    gate, up, down = (f"{EXPERTS}{number}.{part}_proj" for part in ("gate", "up", "down"))
    return gate, up, down
