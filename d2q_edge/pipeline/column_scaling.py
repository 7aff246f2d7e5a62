"""Give the linear groups of a block column scales (DSQ, D2Quant section 3.2), absorbed by what precedes each group.

A group's weights are divided by the scales, and the norm, or the rows of the linear layer, that its input comes from
are multiplied by them: the block computes the same function. quantize/dsq.py has the formula for the scales.
"""

from collections.abc import Mapping

import torch
from torch import nn

from d2q_edge.calibration.output_gradients import group_rows
from d2q_edge.formats.quantized_block import QuantizedBlock, float_array
from d2q_edge.formats.tensor_types import F32
from d2q_edge.model.families import Family, LinearGroup
from d2q_edge.model.families.experts import dense_groups
from d2q_edge.pipeline.context import Context, check_sums
from d2q_edge.quantize.dsq import InputEnergy, absorb, column_scales, weight_energy
from d2q_edge.quantize.output_hessian import OutputHessian

ENERGY_BATCH_STRIDE = 4
"""Every fourth batch is enough for the column scales."""


def scale_columns(context: Context, index: int, block: nn.Module) -> QuantizedBlock:
    """Find column scales for all groups of block number `index`, and absorb them in place.

    Returns:
        The scales, and the parameters that absorbed some and won't be quantized.

    Raises:
        D2QError: inputs are too large.
    """
    family, prefix = context.family, context.family.block_prefix(index)
    groups = {group.linears[0]: group for group in family.block_groups(index) if group.norm or group.absorber}
    energies = _input_energies(context, index, groups, block)
    for layer, energy in energies.items():
        context.processes.all_reduce(energy.sums)
        check_sums(energy.sums, f"{prefix}{layer}")
    result = QuantizedBlock()
    with context.report.timed("statistics"):
        conditional = _conditional_energies(context, energies)
        for layer, group in groups.items():
            layers = [block.get_submodule(each) for each in group.linears]
            weights = weight_energy(layers, _token_shares(family, index, group, energies))
            scales = column_scales(weights, conditional[layer], _absorber_rows(family, index, group, context.device))
            result.column_scales[layer] = float_array(scales)
            result.floats |= _absorb(family, index, block, group, scales)
    return result


def absorb_scales(family: Family, index: int, block: nn.Module, scales: Mapping[str, torch.Tensor]) -> None:
    """Absorb the column scales of finished block `index`, by the first layer of each group, in place."""
    for group in family.block_groups(index):
        if group.linears[0] in scales:
            _absorb(family, index, block, group, scales[group.linears[0]])


def output_hessians(context: Context, index: int, scales: Mapping[str, F32]) -> dict[str, OutputHessian]:
    """Return G of the rows of block `index` (guidance), by the groups' first layers, as the column scales are.

    Rows that absorb scales are larger by them, and the gradients at their outputs smaller. Every process must call it.

    Raises:
        D2QError: G was kept on disk, and the file is damaged.
    """
    if context.guidance is None:
        return {}
    family, device = context.family, context.device
    groups = {group.linears[0]: group for group in dense_groups(family, index)}
    rows = {layer: group_rows(family, index, group) for layer, group in groups.items()}
    found = context.guidance.output_hessians(index, rows, device)
    factors: dict[str, torch.Tensor] = {}
    for reader in family.block_groups(index):
        if reader.absorber in family.block_linears(index) and reader.linears[0] in scales:
            factor = torch.ones(family.linear_shape(index, reader.absorber)[0], device=device)
            own = torch.from_numpy(scales[reader.linears[0]]).to(device)
            factor[_absorber_rows(family, index, reader, device)] = own
            factors[reader.absorber] = factor
    result = {}
    for layer, hessian in found.items():
        parts = [
            factors.get(each, torch.ones(family.linear_shape(index, each)[0], device=device))
            for each in groups[layer].linears
        ]
        result[layer] = hessian.scaled(torch.cat(parts))
    return result


def _input_energies(
    context: Context, index: int, groups: Mapping[str, LinearGroup], block: nn.Module
) -> dict[str, InputEnergy]:
    """Sum up the energy of every group's input over this process's batches."""
    family = context.family
    # Experts only see their own tokens; the router sees all.
    watched = {(_routers(family, index, group) or (layer,))[0]: layer for layer, group in groups.items()}
    energies = {layer: InputEnergy(family.linear_shape(index, layer)[1], context.device) for layer in groups}
    for batch in context.streams.own:
        if batch % ENERGY_BATCH_STRIDE == 0 or family.num_experts:
            with context.report.timed("forward"):
                inputs = context.runner.inputs_of(block, tuple(watched), context.streams.original[batch])
            with context.report.timed("statistics"):
                for layer, values in inputs.items():
                    energies[watched[layer]].add_batch(values)
    return energies


def _conditional_energies(context: Context, energies: Mapping[str, InputEnergy]) -> dict[str, torch.Tensor]:
    """Compute `InputEnergy.conditional` of every group, each in one process."""
    found = {layer: torch.empty_like(energy.gram[0]) for layer, energy in energies.items()}
    every = list(energies.values())
    costs = [len(energy.gram) ** 3 for energy in every]
    context.processes.compute_sharded(list(found.values()), costs, lambda number: every[number].conditional())
    return found


def _token_shares(
    family: Family, index: int, group: LinearGroup, energies: Mapping[str, InputEnergy]
) -> list[torch.Tensor] | None:
    """Return the share of the tokens that each layer of a group sees; None where all see all tokens."""
    experts = family.block_experts(index)
    if experts is None or group.norm != experts.norm:
        return None
    every = energies[group.linears[0]].tokens
    downs = [experts.linears(number)[2] for number in range(experts.count)]
    shares = [energies[down].tokens / every for down in downs for _ in ("gate", "up")]
    return shares + [torch.ones_like(every)] * (len(group.linears) - len(shares))


def _routers(family: Family, index: int, group: LinearGroup) -> tuple[str, ...]:
    """Return the routers that read the same input as a group."""
    readers = family.residual_readers(index)
    return tuple(router for router in family.block_routers(index) if readers[router] == group.norm)


def _absorber_rows(family: Family, index: int, group: LinearGroup, device: torch.device) -> torch.Tensor | None:
    """Return the row of the absorbing layer for each column; None where a norm absorbs the scales."""
    return None if group.absorber is None else torch.from_numpy(family.absorber_rows(index, group.absorber)).to(device)


def _absorb(family: Family, index: int, block: nn.Module, group: LinearGroup, scales: torch.Tensor) -> dict[str, F32]:
    """Scale a group's columns and what absorbs the scales; return the changed parameters that won't be quantized."""
    kept = [name for name in family.block_kept_linears(index) if family.residual_readers(index)[name] == group.norm]
    unquantized = (*_routers(family, index, group), *kept)
    layers = [block.get_submodule(layer) for layer in (*group.linears, *unquantized)]
    absorber = group.norm or group.absorber
    if absorber is None:
        raise ValueError(f"nothing absorbs column scales of {group.linears[0]}")
    module = block.get_submodule(absorber)
    offset = family.norm_offset if group.norm else 0.0
    absorb(layers, module, scales, _absorber_rows(family, index, group, scales.device), offset)
    names = ("bias",) if absorber in family.block_linears(index) else ("weight", "bias")
    changed = [f"{absorber}.{name}" for name, _ in module.named_parameters(recurse=False) if name in names]
    changed += [f"{layer}.weight" for layer in unquantized]
    return {name: float_array(block.get_parameter(name)) for name in changed}
