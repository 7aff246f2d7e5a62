"""Column scales of the blocks: measured on the original stream, and absorbed by what makes a linear group's input.

Knows which layers share a scale and who absorbs it (families/ says so), and what experts and their routers have to do
with it. How a scale follows from weights and inputs is quantize/dsq.py's business. A block's function stays the same.
"""

from collections.abc import Mapping

import torch
from torch import nn

from d2q_edge.calibration.hidden_states import Stream
from d2q_edge.distributed.process_group import ProcessGroup
from d2q_edge.errors import D2QError
from d2q_edge.model.blocks import BlockRunner
from d2q_edge.model.families import LinearGroup
from d2q_edge.model.families.experts import expert_linears
from d2q_edge.pipeline.report import Report
from d2q_edge.pipeline.work_dir import Tensor
from d2q_edge.quantize.dsq import InputEnergy, absorb, column_scales, weight_energy

ENERGY_SHARE = 4
"""Every fourth batch is enough for the column scales."""
COLUMN_SCALE = "column_scale"
"""Last part of a name: the column scale of a linear group, kept under the linear group's first layer, or of the head."""


def check_sums(sums: list[torch.Tensor], name: str) -> None:
    """Refuse sums of squares that aren't finite, which happens to numbers that are.

    Raises:
        D2QError: they are of the inputs of the layer `name`.
    """
    if not all(bool(each.isfinite().all()) for each in sums):
        raise D2QError(
            f"the inputs of {name} are too large to calculate with; the checkpoint may be damaged, or not a language "
            "model's"
        )


def float_array(values: torch.Tensor) -> Tensor:
    """Float32 values on the CPU, as they are kept in the work directory."""
    array: Tensor = values.detach().float().cpu().numpy()
    return array


class ColumnScaling:
    """Of the blocks of one model."""

    def __init__(self, runner: BlockRunner, report: Report, processes: ProcessGroup) -> None:
        """Begin; what is measured goes into the report."""
        self.runner, self.family, self.report, self.processes = runner, runner.family, report, processes

    def apply(self, block: nn.Module, prefix: str, stream: Stream, own: range) -> dict[str, Tensor]:
        """Give all linear_groups of a block column scales.

        Args:
            block: to be changed.
            prefix: that makes full names of its names.
            stream: hidden states before the block, in the original model.
            own: which batches are this process's.

        Returns:
            What changed and won't be quantized, by name in the block.
        """
        linear_groups = {group.linears[0]: group for group in self.family.linear_groups if group.norm or group.absorber}
        # Experts see their own tokens only, which the router sees all of.
        watched = {(self._routers(group) or (name,))[0]: name for name, group in linear_groups.items()}
        energies = {name: InputEnergy(self.family.linear_shape(name)[1], self.runner.device) for name in linear_groups}
        for index in own:
            if index % ENERGY_SHARE == 0 or self.family.num_experts:
                with self.report.timed("forward"):
                    seen, _ = self.runner.trace(block, tuple(watched), stream[index])
                with self.report.timed("statistics"):
                    for layer, inputs in seen.items():
                        energies[watched[layer]].add_batch(inputs)
        for name, energy in energies.items():
            self.processes.all_reduce(energy.sums)
            check_sums(energy.sums, f"{prefix}{name}")
        with self.report.timed("statistics"):
            conditional = self._conditional(energies)
        changed: dict[str, Tensor] = {}
        for name, group in linear_groups.items():
            with self.report.timed("statistics"):
                layers = [block.get_submodule(each) for each in group.linears]
                weights = weight_energy(layers, self._shares(group, energies))
                scales = column_scales(weights, conditional[name], self._rows(group))
            self.report.add_scales(prefix + name, scales)
            changed |= {f"{name}.{COLUMN_SCALE}": float_array(scales), **self.absorb(block, group, scales)}
        return changed

    def _conditional(self, energies: Mapping[str, InputEnergy]) -> dict[str, torch.Tensor]:
        """`InputEnergy.conditional` of every linear group, each by one process."""
        found = {name: torch.empty_like(energy.gram[0]) for name, energy in energies.items()}
        every = list(energies.values())
        costs = [len(energy.gram) ** 3 for energy in every]
        self.processes.compute_sharded(list(found.values()), costs, lambda number: every[number].conditional())
        return found

    def _shares(self, group: LinearGroup, energies: Mapping[str, InputEnergy]) -> list[torch.Tensor] | None:
        """The part of the tokens that each layer of a linear group sees; None where they see all."""
        if not self._routers(group):
            return None
        every = energies[group.linears[0]].tokens
        downs = [expert_linears(number)[2] for number in range(self.family.num_experts)]
        return [energies[down].tokens / every for down in downs for _ in ("gate", "up")]

    def _routers(self, group: LinearGroup) -> tuple[str, ...]:
        """The routers that read what a linear group's layers read."""
        readers = self.family.residual_readers
        return tuple(router for router in self.family.block_routers() if readers[router] == group.norm)

    def absorb(self, block: nn.Module, group: LinearGroup, scales: torch.Tensor) -> dict[str, Tensor]:
        """Scale a linear group's columns and what makes them; returns what of the latter, and of routers, isn't quantized."""
        routers = self._routers(group)
        layers = [block.get_submodule(name) for name in (*group.linears, *routers)]
        maker = group.norm or group.absorber
        if maker is None:
            raise ValueError(f"nothing absorbs column scales of {group.linears[0]}")
        module = block.get_submodule(maker)
        absorb(layers, module, scales, self._rows(group), self.family.norm_offset if group.norm else 0.0)
        kept = ("weight", "bias") if group.norm else ("bias",)
        changed = {
            f"{maker}.{name}": float_array(values)
            for name, values in module.named_parameters(recurse=False)
            if name in kept
        }
        return changed | {
            f"{name}.weight": float_array(block.get_submodule(name).get_parameter("weight")) for name in routers
        }

    def scaled_norm(self, norm: nn.Module, scales: torch.Tensor) -> torch.Tensor:
        """A norm's weight that makes its output larger by the scales."""
        offset = self.family.norm_offset
        return (norm.get_parameter("weight") + offset) * scales - offset

    def _rows(self, group: LinearGroup) -> torch.Tensor | None:
        """The row of its source that each column of a linear group's input is proportional to."""
        if group.absorber is None:
            return None
        return torch.from_numpy(self.family.absorber_rows(group.absorber)).to(self.runner.device)
