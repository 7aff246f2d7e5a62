"""Make the keys that record a model's column scales (formats/column_scales.py) from those of its blocks."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from d2q_edge.export.model_file import Value
from d2q_edge.formats.column_scales import CODES, ONE, USERS, describe_users, encode_scales
from d2q_edge.formats.tensor_types import F32
from d2q_edge.model.families import Family, LinearGroup

BlockScales = Callable[[int], Mapping[str, F32]]
"""Returns QuantizedBlock.column_scales of a block, or of what follows the last one."""


@dataclass(frozen=True)
class _Array:
    """The scales of one linear group, each of them once."""

    block: int
    layer: str  # their name in QuantizedBlock.column_scales
    chosen: npt.NDArray[np.int64]  # the columns that they are taken from
    users: str


def scale_keys(family: Family, scales: BlockScales | None) -> dict[str, Value]:
    """Return the keys, of the same size without scales; none for experts, whose adapters aren't supported."""
    if family.num_experts:
        return {}
    arrays = list(_arrays(family))
    if scales is None:
        codes = bytes([ONE]) * sum(len(array.chosen) for array in arrays)
    else:
        found: dict[int, Mapping[str, F32]] = {}
        parts = []
        for array in arrays:
            if array.block not in found:
                found = {array.block: scales(array.block)}
            parts.append(encode_scales(found[array.block][array.layer][array.chosen]).tobytes())
        codes = b"".join(parts)
    return {USERS: [array.users for array in arrays], CODES: codes}


def _arrays(family: Family) -> Iterator[_Array]:
    for index in range(family.num_layers):
        for group in family.block_groups(index):
            if group.norm or group.absorber:
                yield _group_array(family, index, group)
    if not family.tied_embeddings:
        users = describe_users(family.hidden_size, [family.gguf_name(f"{family.head}.weight")], None)
        yield _Array(family.num_layers, family.head, np.arange(family.hidden_size), users)


def _group_array(family: Family, index: int, group: LinearGroup) -> _Array:
    def name(layer: str) -> str:
        return family.gguf_name(f"{family.block_prefix(index)}{layer}.weight")

    layer, rows = group.linears[0], None
    chosen = np.arange(family.linear_shape(index, layer)[1])
    if group.absorber in family.block_linears(index):
        rows = name(group.absorber)
        every, chosen = np.unique(family.absorber_rows(index, group.absorber), return_index=True)
        if not np.array_equal(every, np.arange(family.linear_shape(index, group.absorber)[0])[-len(every) :]):
            raise ValueError(f"{group.absorber} doesn't absorb scales in its last rows")
    return _Array(index, layer, chosen, describe_users(len(chosen), [name(each) for each in group.linears], rows))
