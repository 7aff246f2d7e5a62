"""Which tensor type every tensor of the output gets, and how large the file's data will be.

Knows bit widths, types and sizes. Does not know weights: a plan is made from config.json and printed by --dry-run
before any work starts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from d2q_edge.errors import D2QError
from d2q_edge.families import Family
from d2q_edge.gguf_file import STOCK_TYPES, block_and_type_size, fitting_type
from d2q_edge.tensor_types import D2Q2, D2Q2_64, D2Q3, D2Q3_64

OWN_TYPES = MappingProxyType({2: (D2Q2, D2Q2_64), 3: (D2Q3, D2Q3_64)})
"""By --bits: the type for widths that 256 divides, and the one for widths that only 64 divides."""
FALLBACK = "q4_0"
"""For the rare width that 64 doesn't divide but 32 does."""
HEAD_TYPES = ((2.75, "q5_k"), (math.inf, "q6_k"))
"""Default types of the head, and of embeddings that are the head too, each for --bits below its limit.

The smallest whose KL divergence is less than about 3 % of the whole file's, measured with everything else in f16 on
books.heldout.txt (40 chunks of 512): on qwen3-34m (tied) q4_k 0.0106, q5_k 0.0032, q6_k 0.0009, q8_0 0.0001; on the
head of llama-54m q4_k 0.0063, q5_k 0.0019, q6_k 0.0005, q8_0 0.0001. Whole files are at 0.15 to 0.2 with 2 bits, at
0.045 to 0.06 with 3."""
EMBEDDING_TYPES = ((3.5, "q4_k"), (math.inf, "q6_k"))
"""The same of embeddings that aren't the head: llama-54m q4_0 0.0014, q4_k 0.0010, q6_k 0.0001."""


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
        wide = D2Q2_64.block_size
        return [name for name in self.linears if self.shapes[name][1] % wide]

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
        embedding_type: stock type of the embeddings (and of the head, where they are tied); None chooses by `bits`.
        head_type: stock type of the head; only where it is a tensor of its own. None chooses.

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
    default = _below(HEAD_TYPES if family.tied_embeddings else EMBEDDING_TYPES, bits)
    tables = {embedding: fitting_type(embedding_type or default, shapes[embedding][1])}
    if not family.tied_embeddings:
        tables[head] = fitting_type(head_type or _below(HEAD_TYPES, bits), shapes[head][1])
    return Plan(linears, tables, {name: shapes[name] for name in (*tables, *linears)})


def _own_or_fallback(bits: int, width: int) -> str:
    for own in OWN_TYPES[bits]:
        if width % own.block_size == 0:
            return own.name
    return fitting_type(FALLBACK, width)


def _below(choices: tuple[tuple[float, str], ...], bits: float) -> str:
    return next(kind for limit, kind in choices if bits < limit)


def _bits(kind: str) -> float:
    block, size = block_and_type_size(kind)
    return 8 * size / block
