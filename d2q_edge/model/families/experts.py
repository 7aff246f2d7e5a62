"""Define what Mixture-of-Experts families have in common: some blocks, or all, have a router and experts, each a gated
MLP.

Checkpoints have separate tensors for every expert (mlp.experts.N.gate_proj.weight), GGUF files one stack of all experts
for each of the three layers (blk.N.ffn_gate_exps.weight). The router, mlp.gate, reads the same input as the experts and
stays f32.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any, ClassVar

from d2q_edge.errors import D2QError
from d2q_edge.model.families.base import Family
from d2q_edge.model.families.gguf_keys import GGUFKeys
from d2q_edge.model.families.layout import LinearGroup, RoutedExperts

MAX_EXPERTS = 1024  # llama.cpp's limit
MAX_ALL_EXPERTS = 100_000  # more than any model has in all blocks together: Qwen3-235B-A22B has 12032, Kimi K2 23040


class MixtureOfExperts(Family):
    """A family with experts; the config also sets expert_width, their intermediate size."""

    refused_flags: ClassVar[tuple[str, ...]] = ("attention_bias",)
    expert_width_key: ClassVar[str] = "intermediate_size"  # key in config.json of the experts' intermediate size
    normalizes_top_k: ClassVar[bool]
    """Whether llama.cpp's graph normalizes the weights of the chosen experts to a sum of one."""
    normalizes_by_default: ClassVar[bool] = False  # transformers' default of norm_topk_prob
    # An expert's layers in the order of llama.cpp's converter.
    stacked_parts: ClassVar[tuple[str, ...]] = ("down_proj", "gate_proj", "up_proj")

    def block_experts(self, index: int) -> RoutedExperts | None:
        return RoutedExperts("mlp", "mlp.gate", "post_attention_layernorm", self.num_experts, self.expert_parts)

    def block_groups(self, index: int) -> tuple[LinearGroup, ...]:
        groups, experts = super().block_groups(index), self.block_experts(index)
        if experts is None:
            return groups
        others = (group for group in groups if not group.linears[0].startswith(f"{experts.module}."))
        return (*others, *_expert_groups(experts))

    def residual_readers(self, index: int) -> Mapping[str, str]:
        experts = self.block_experts(index)
        return {**super().residual_readers(index), **({experts.router: experts.norm} if experts else {})}

    @cached_property
    def stacks(self) -> Mapping[str, tuple[str, ...]]:
        stacks = {}
        for index in range(self.num_layers):
            if (experts := self.block_experts(index)) is None:
                continue
            prefix = f"{self.block_prefix(index)}{experts.prefix}"
            for part in self.stacked_parts:
                parts = tuple(f"{prefix}{number}.{part}.weight" for number in range(self.num_experts))
                stacks[f"{prefix}{part}.weight"] = parts
        return MappingProxyType(stacks)

    def linear_shape(self, index: int, linear: str) -> tuple[int, int]:
        if ".experts." not in linear:
            return super().linear_shape(index, linear)
        wide = self.expert_width, self.hidden_size
        return wide[::-1] if linear.endswith(f".{self.expert_parts[2]}") else wide

    def block_routers(self, index: int) -> dict[str, tuple[int, int]]:
        experts = self.block_experts(index)
        return {experts.router: (self.num_experts, self.hidden_size)} if experts else {}

    def gguf_name(self, hf_name: str) -> str:
        """Return the GGUF name of a tensor; for an expert's weight, that of its stack."""
        return super().gguf_name(re.sub(r"\.experts\.\d+\.", ".experts.", hf_name, count=1))

    @classmethod
    def import_config(cls, keys: GGUFKeys) -> dict[str, Any]:
        config = super().import_config(keys)
        config["num_experts"] = keys.whole("expert_count", 0)
        config["num_experts_per_tok"] = keys.whole("expert_used_count", 0)
        config["norm_topk_prob"] = cls.normalizes_top_k
        return config

    def _refuse_unsupported(self) -> None:
        super()._refuse_unsupported()
        self._read_experts()

    def _read_experts(self) -> None:
        """Read how many experts there are, how wide, and how they are chosen."""
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
        if self._flag("norm_topk_prob", default=self.normalizes_by_default) != self.normalizes_top_k:
            raise D2QError(
                f"config.json: norm_topk_prob is {str(not self.normalizes_top_k).lower()}, but llama.cpp's "
                f"{self.gguf_arch} always computes as if it were {str(self.normalizes_top_k).lower()}"
            )


def dense_groups(family: Family, index: int) -> tuple[LinearGroup, ...]:
    """Return the linear groups of block `index` without the experts' layers."""
    groups, experts = family.block_groups(index), family.block_experts(index)
    if experts is None:
        return groups
    kept = ((group, [name for name in group.linears if not name.startswith(experts.prefix)]) for group in groups)
    return tuple(replace(group, linears=tuple(linears)) for group, linears in kept if linears)


def solved_groups(family: Family, index: int) -> tuple[LinearGroup, ...]:
    """Return the linear groups of block `index` as they are quantized, every expert by itself."""
    experts = family.block_experts(index)
    numbers = range(experts.count if experts else 0)
    return (*dense_groups(family, index), *(group for n in numbers if experts for group in experts.groups(n)))


@lru_cache(maxsize=2)
def _expert_groups(experts: RoutedExperts) -> tuple[LinearGroup, ...]:
    """Return the linear groups of a block's experts, and of what all tokens pass beside them."""
    every = [experts.linears(number) for number in range(experts.count)]
    every += [(experts.shared[0], experts.shared[1], experts.shared[2])] if experts.shared else []
    return (
        LinearGroup(experts.norm, tuple(name for gate, up, _ in every for name in (gate, up))),
        *(LinearGroup(None, (down,), absorber=up) for _, up, down in every),
    )
