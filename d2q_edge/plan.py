"""Which tensor type every tensor of the output gets, and how large the file's data will be.

Knows bit widths, types and sizes. Does not know weights: a plan is made from config.json and printed by --dry-run
before any work starts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from d2q_edge import tensor_types
from d2q_edge.errors import D2QError
from d2q_edge.families import Family
from d2q_edge.gguf_file import STOCK_TYPES, block_and_type_size
from d2q_edge.tensor_types import D2Q2, D2Q2_64, D2Q3, D2Q3_64

OWN_TYPES = MappingProxyType({2: (D2Q2, D2Q2_64), 3: (D2Q3, D2Q3_64)})
"""By --bits: the type for widths that 256 divides, and the one for widths that only 64 divides."""
FALLBACK = "q4_0"
"""For the rare width that 64 doesn't divide but 32 does."""
DEFAULT_EMBEDDING = "q8_0"
"""Smallest stock type that gguf-py can write without a measurable loss."""


@dataclass(frozen=True)
class Plan:
    """Tensor types, by checkpoint name.

    Attributes:
        linears: name to type name, of the weights of the blocks' linear layers, in forward order.
        tables: the same of the embeddings, and of the head where it is a tensor of its own.
        shapes: name to shape, of both.
    """

    linears: Mapping[str, str]
    tables: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def types(self) -> Mapping[str, str]:
        """Name to type name, of all matrices."""
        return {**self.tables, **self.linears}

    @property
    def fallbacks(self) -> list[str]:
        """Linear layers whose width none of our types can hold."""
        return [name for name, kind in self.linears.items() if kind not in tensor_types.BY_NAME]

    @property
    def bits_per_weight(self) -> float:
        """Mean over all weights of all matrices, embeddings and head included."""
        return self._mean_bits(self.types)

    @property
    def linear_bits_per_weight(self) -> float:
        """Mean over the weights of the blocks' linear layers."""
        return self._mean_bits(self.linears)

    def _mean_bits(self, types: Mapping[str, str]) -> float:
        bits = sum(math.prod(self.shapes[name]) * _bits(kind) for name, kind in types.items())
        return bits / sum(math.prod(self.shapes[name]) for name in types)


def make_plan(family: Family, bits: int, embedding_type: str | None = None, head_type: str | None = None) -> Plan:
    """Choose types for one model.

    Args:
        family: of the model.
        bits: 2 or 3, for the linear layers of the blocks.
        embedding_type: stock type of the embeddings (and of the head, where they are tied).
        head_type: stock type of the head; only where it is a tensor of its own.

    Raises:
        D2QError: a type isn't a stock type that can be written, or the head has no type of its own.
    """
    embedding, head = f"{family.embedding}.weight", f"{family.head}.weight"
    if head_type is not None and family.tied_embeddings:
        raise D2QError("the head of this model is its embedding matrix (tied); use --embedding-type alone")
    embedding_type, head_type = embedding_type and embedding_type.lower(), head_type and head_type.lower()
    for option, kind in (("--embedding-type", embedding_type), ("--head-type", head_type)):
        if kind is not None and kind not in STOCK_TYPES:
            known = ", ".join(STOCK_TYPES)
            raise D2QError(f"{option} {kind!r} isn't a stock type that can be written; these are: {known}")
    shapes = family.tensor_shapes()
    linears = {name: _own_or_fallback(bits, shapes[name][1]) for name in family.linear_weights()}
    tables = {embedding: _stock_or_f16(embedding_type or DEFAULT_EMBEDDING, shapes[embedding][1])}
    if not family.tied_embeddings:
        tables[head] = _stock_or_f16(head_type or DEFAULT_EMBEDDING, shapes[head][1])
    return Plan(linears, tables, {name: shapes[name] for name in (*tables, *linears)})


def _own_or_fallback(bits: int, width: int) -> str:
    for own in OWN_TYPES[bits]:
        if width % own.block_size == 0:
            return own.name
    return _stock_or_f16(FALLBACK, width)


def _stock_or_f16(kind: str, width: int) -> str:
    return kind if width % block_and_type_size(kind)[0] == 0 else "f16"


def _bits(kind: str) -> float:
    block, size = block_and_type_size(kind)
    return 8 * size / block
