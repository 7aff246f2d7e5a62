"""The sublayer of a block that has experts: every expert is quantized for its own tokens.

Which tokens those are the original model's router decides, for both streams (quantize/routing.py): the statistics of
an expert compare the inputs of the same tokens. A token that goes to another expert in the quantized model meets one
that was quantized for its likes all the same. Experts are handled as many at a time as MEMORY holds the statistics of;
for each such group both streams pass twice, once for gate and up, once for down, which reads what the quantized gates
and ups put out.

Knows the order of these steps. The column scales are there already, and how a layer is quantized is the caller's
business (pipeline.py).
"""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from d2q_edge.calibration.hidden_states import Stream
from d2q_edge.distributed.process_group import ProcessGroup
from d2q_edge.model.blocks import BlockRunner
from d2q_edge.model.experts import Expert
from d2q_edge.model.families import Family, LinearGroup, Sublayer
from d2q_edge.model.families.experts import EXPERTS, ROUTER, expert_linears
from d2q_edge.pipeline.report import Report
from d2q_edge.pipeline.work_dir import Tensor
from d2q_edge.quantize.routing import MINIMUM_SHARE, top_up
from d2q_edge.quantize.statistics import InputStatistics

MEMORY = 2**30
"""Bytes of statistics at a time."""

QuantizeGroup = Callable[[LinearGroup, InputStatistics], Mapping[str, Tensor]]
"""Quantizes the layers of a linear group inside of the student and returns the result by name in the block."""


class ExpertGroups:
    """The experts of one block, and both streams in front of them."""

    def __init__(
        self,
        runner: BlockRunner,
        teacher: nn.Module,
        student: nn.Module,
        sublayer: Sublayer,
        streams: tuple[Stream, Stream],
        processes: ProcessGroup,
        report: Report,
    ) -> None:
        """Find out which tokens every expert is quantized for.

        Args:
            runner: of the model.
            teacher: the block.
            student: its copy, which is going to be quantized.
            sublayer: the one with the experts.
            streams: what this sublayer reads in the original and in the quantized model.
            processes: the processes that share the work; all of them do this.
            report: of the conversion.
        """
        self.runner, self.family, self.sublayer = runner, runner.family, sublayer
        self.teacher, self.student = teacher, student
        self.original, self.quantized = streams
        self.processes, self.report = processes, report
        self.own = processes.shard_range(len(self.original))
        self.tokens = self._choose_tokens()
        """bool [tokens, experts] of every batch of this process, on the CPU."""

    def quantize(self, quantize_group: QuantizeGroup) -> dict[str, Tensor]:
        """Quantize all experts; returns the new tensors by name in the block."""
        result: dict[str, Tensor] = {}
        for group in _groups(self.family):
            names = {number: expert_linears(number) for number in group}
            statistics = self._statistics(group, self.family.hidden_size, lambda _, inputs: inputs)
            for number, (gate, up, _) in names.items():
                result |= quantize_group(LinearGroup(self.sublayer.norm, (gate, up)), statistics.pop(number))
            statistics = self._statistics(group, self.family.linear_shape(names[group[0]][2])[1], Expert.gated)
            for number, (_, up, down) in names.items():
                result |= quantize_group(LinearGroup(None, (down,), source=up), statistics.pop(number))
        return result

    def _choose_tokens(self) -> dict[int, torch.Tensor]:
        """For every batch of this process, the tokens of every expert, bool [tokens, experts] on the CPU."""
        router = self.teacher.get_submodule(ROUTER)
        sizes = [self.original.tokens(index) for index in range(len(self.original))]
        probabilities = torch.zeros(sum(sizes), self.family.num_experts)
        routed = torch.zeros_like(probabilities)
        batches = zip(probabilities.split(sizes), routed.split(sizes), strict=True)
        for index, (likely, taken) in enumerate(batches):
            if index in self.own:
                with self.report.timed("forward"):
                    logits, _, chosen = router(self._inputs(self.teacher, self.original[index]))
                likely.copy_(logits.float().softmax(-1))
                taken.scatter_(1, chosen.cpu(), 1.0)
        # Every process fills in its own tokens, so that all choose the same.
        self.processes.all_reduce([probabilities, routed])
        tokens = top_up(probabilities, routed.bool(), MINIMUM_SHARE * self.family.hidden_size)
        return {index: batch for index, batch in enumerate(tokens.split(sizes)) if index in self.own}

    def _statistics(
        self, group: list[int], columns: int, inputs_of: Callable[[Expert, torch.Tensor], torch.Tensor]
    ) -> dict[int, InputStatistics]:
        """By the experts' numbers, of what `inputs_of` makes of an expert and its tokens in both models."""
        device = self.runner.device
        found = {number: InputStatistics(columns, device) for number in group}
        for index in self.own:
            with self.report.timed("forward"):
                wanted = self._inputs(self.teacher, self.original[index])
                reached = self._inputs(self.student, self.quantized[index])
                tokens = self.tokens[index][:, group].to(device)
            with self.report.timed("statistics"):
                for number, own in zip(group, tokens.unbind(1), strict=True):
                    ours = inputs_of(_expert(self.student, number), reached[own])
                    found[number].add_batch(ours, inputs_of(_expert(self.teacher, number), wanted[own]))
        for number in group:
            self.processes.all_reduce(found[number].sums)
        return found

    def _inputs(self, block: nn.Module, residual: torch.Tensor) -> torch.Tensor:
        """What router and experts read: float32 [tokens, hidden]."""
        inputs: torch.Tensor = block.get_submodule(self.sublayer.norm)(residual)
        return inputs.flatten(0, -2)


def statistics_bytes(family: Family) -> int:
    """What the statistics of a group of experts take; zero without experts."""
    return max(len(group) for group in _groups(family)) * _expert_bytes(family) if family.num_experts else 0


def routing_bytes(family: Family, tokens: int) -> int:
    """What it takes, on the computer, to find out the experts' tokens among so many."""
    # Probabilities and routes as float32; routes and choices as bool, twice while they are made.
    return tokens * family.num_experts * (2 * 4 + 4)


def _groups(family: Family) -> list[list[int]]:
    """The experts' numbers, in groups whose statistics fit into MEMORY."""
    size = max(1, MEMORY // _expert_bytes(family))
    return [list(range(family.num_experts))[start : start + size] for start in range(0, family.num_experts, size)]


def _expert_bytes(family: Family) -> int:
    """What the statistics of one expert's layers take: two matrices, float32."""
    columns = max(family.linear_shape(layer)[1] for layer in expert_linears(0))
    return 2 * 4 * columns**2


def _expert(block: nn.Module, number: int) -> Expert:
    expert = block.get_submodule(f"{EXPERTS}{number}")
    if not isinstance(expert, Expert):
        raise TypeError(f"expert {number} is a {type(expert).__name__}")
    return expert
