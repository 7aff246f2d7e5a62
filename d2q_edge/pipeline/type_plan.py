"""Choose the tensor type of every tensor of the output, and know how large its data will be.

A plan needs config.json only; for a mixture of types it also needs each layer's sensitivity (sensitivity.py).
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from d2q_edge.errors import D2QError
from d2q_edge.formats.gguf_writer import STOCK_TYPES, block_and_type_size, fitting_type
from d2q_edge.formats.tensor_types import D2Q2, D2Q2_64, D2Q3, D2Q3_64, Q4_0
from d2q_edge.model.families import Family
from d2q_edge.options import HIGHEST_BITS, LOWEST_BITS
from d2q_edge.pipeline.allocation import Choice, allocate

OWN_TYPES = MappingProxyType({2: (D2Q2, D2Q2_64), 3: (D2Q3, D2Q3_64)})
"""By --bits: the type for widths that 256 divides, and the one for widths that only 64 divides."""
SQUARED_ERROR = MappingProxyType({"d2q2": 0.0597, "d2q2_64": 0.0577, "d2q3": 0.0153, "d2q3_64": 0.0150, "q4_0": 0.0065})
"""Of weights rounded to nearest, relative to the weights' squares: Gaussian weights, which the layers of qwen3-34m and
llama-54m equal within 2 %. A layer's sensitivity scales with it. Without a GPU the search finds 2 % more at 3 bits."""
FALLBACK = "q4_0"
"""For the rare width that 64 doesn't divide but 32 does."""
HEAD_TYPES = ((2.75, "q5_k"), (math.inf, "q6_k"))
"""Default types of the head, and of embeddings that are the head too, each for --bits below its limit.

The smallest whose KL divergence is less than about 3 % of the whole file's, measured with everything else in f16 on
books.heldout.txt (40 chunks of 512): on qwen3-34m (tied) q4_k 0.0106, q5_k 0.0032, q6_k 0.0009, q8_0 0.0001; on the
head of llama-54m q4_k 0.0063, q5_k 0.0019, q6_k 0.0005, q8_0 0.0001. Whole files are at 0.15 to 0.2 with 2 bits, at
0.045 to 0.06 with 3."""
PER_LAYER_TYPES = ((2.75, "d2q2"), (math.inf, "d2q3"))
"""Default types of embeddings that every block has for itself, most of the bytes of Gemma 4 E2B.

So that a bit more per weight gains less than in the layers: on a Gemma 4 of 5 million weights, trained for 20 minutes,
rounded to nearest, books.heldout.txt, d2q2 costs 0.0077, d2q3 0.0020, q4_0 0.0010, q4_k 0.0007, q8_0 0.0000, against
0.050 of all layers in d2q2 and 0.014 in d2q3; the model without the table is at 0.30."""
PER_LAYER_PROJECTION = "q8_0"
"""Of the matrix that goes with them, less than a percent of the weights: q8_0 costs 0.000003, q4_0 0.0006."""
EMBEDDING_TYPES = ((3.5, "q4_k"), (math.inf, "q6_k"))
"""The same of embeddings that aren't the head: llama-54m q4_0 0.0014, q4_k 0.0010, q6_k 0.0001."""


@dataclass(frozen=True)
class TypePlan:
    """Tensor types, by checkpoint name.

    Attributes:
        linears: name to type name, of the weights of the blocks' linear layers, in forward order.
        tables: the same of embeddings, of the head where it is a tensor of its own, and of embeddings for every block.
        shapes: name to shape, of both.
    """

    linears: Mapping[str, str]
    tables: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def all(self) -> Mapping[str, str]:
        """Name to type name, of all matrices."""
        return {**self.tables, **self.linears}

    @property
    def nearest_bits(self) -> int:
        """2 or 3: the bits of the type of ours that holds more bytes of the linear layers."""
        sizes = dict.fromkeys(OWN_TYPES, 0.0)
        for name, kind in self.linears.items():
            for bits, own in OWN_TYPES.items():
                if kind in (t.name for t in own):
                    sizes[bits] += math.prod(self.shapes[name]) * _bits(kind)
        return max(sizes, key=lambda bits: sizes[bits])

    def layer_types(self) -> dict[str, Counter[str]]:
        """Count the types of the linear layers by the last part of their names ("q_proj"), in forward order."""
        counts: dict[str, Counter[str]] = {}
        for name, kind in self.linears.items():
            counts.setdefault(name.split(".")[-2], Counter())[kind] += 1
        return counts

    @property
    def fallbacks(self) -> list[str]:
        """Linear layers whose width no type of ours fits."""
        wide = D2Q2_64.block_size
        return [name for name in self.linears if self.shapes[name][1] % wide]

    @property
    def bits_per_weight(self) -> float:
        """Mean over all weights of all matrices, embeddings and head included."""
        return self._mean_bits(self.all)

    @property
    def linear_bits_per_weight(self) -> float:
        """Mean over the weights of the blocks' linear layers."""
        return self._mean_bits(self.linears)

    @property
    def linear_bytes(self) -> int:
        """Bytes of the blocks' linear layers."""
        return math.ceil(sum(math.prod(self.shapes[name]) * _bits(kind) for name, kind in self.linears.items()) / 8)

    def _mean_bits(self, types: Mapping[str, str]) -> float:
        bits = sum(math.prod(self.shapes[name]) * _bits(kind) for name, kind in types.items())
        return bits / sum(math.prod(self.shapes[name]) for name in types)


def is_mixed(bits: float) -> bool:
    """Tell whether a number of bits means a mixture of types."""
    return bits not in OWN_TYPES


def rounding_types(family: Family) -> dict[str, str]:
    """Return the weights and stacks among whose types a mixture chooses, each with its smallest type."""
    widths = {name: family.tensor_shapes()[parts[0]][1] for name, parts in choosable(family).items()}
    return {name: _choices(width)[0] for name, width in widths.items() if len(_choices(width)) > 1}


def choosable(family: Family) -> dict[str, tuple[str, ...]]:
    """Return weights and stacks of weights that can have a type of their own, with the checkpoint names of each."""
    stack_of = {part: stack for stack, parts in family.stacks.items() for part in parts}
    names = dict.fromkeys(stack_of.get(name, name) for name in family.linear_weights())
    return {name: family.stacks.get(name, (name,)) for name in names}


def check_request(
    family: Family,
    bits: float,
    embedding_type: str | None = None,
    head_type: str | None = None,
    per_layer_type: str | None = None,
) -> None:
    """Refuse a request that `plan_types` can't fulfill.

    Raises:
        D2QError: there is no such type, or the bits are out of range.
    """
    if head_type is not None and family.tied_embeddings:
        raise D2QError("the head of this model is its embedding matrix (tied); use --embedding-type alone")
    for option, kind in (("--embedding-type", embedding_type), ("--head-type", head_type)):
        if kind is not None and kind.lower() not in STOCK_TYPES:
            known = ", ".join(STOCK_TYPES)
            raise D2QError(f"{option} {kind.lower()!r} isn't a stock type that can be written; these are: {known}")
    if per_layer_type is not None:
        _check_per_layer_type(family, per_layer_type.lower())
    if not is_mixed(bits):
        return
    if not LOWEST_BITS <= bits <= HIGHEST_BITS:
        raise D2QError(f"--bits {bits:g} is out of range; use 2, 3, or a number from {LOWEST_BITS} to {HIGHEST_BITS}")
    shapes = family.tensor_shapes()
    names = family.linear_weights()
    least = sum(math.prod(shapes[name]) * _bits(_choices(shapes[name][1])[0]) for name in names)
    weights = sum(math.prod(shapes[name]) for name in names)
    if least > _budget(bits, weights):
        raise D2QError(
            f"--bits {bits:g} is too little for this model: 256 doesn't divide all its widths, so that its layers take "
            f"at least {math.ceil(least / weights * 1000) / 1000:g} bits per weight; use that, or --bits 2"
        )


def plan_types(
    family: Family,
    bits: float,
    embedding_type: str | None = None,
    head_type: str | None = None,
    sensitivity: Mapping[str, float] | None = None,
    per_layer_type: str | None = None,
) -> TypePlan:
    """Choose the types of one model's tensors.

    Args:
        family: of the model.
        bits: of the linear layers of the blocks: 2 or 3, or what they may have per weight on average.
        embedding_type: stock type of the embeddings (and of the head, where they are tied); None chooses by `bits`.
        head_type: stock type of the head; only where it is a tensor of its own. None chooses.
        sensitivity: for a mixture: what rounding each of `rounding_types`, layer or stack, costs, in any unit.
        per_layer_type: type, stock or ours, of the embeddings that every block has for itself. None chooses.

    Raises:
        D2QError: a type isn't a stock type that can be written, the head has no type of its own, or the layers can't
            have that many bits.
        ValueError: a mixture without sensitivity.
    """
    check_request(family, bits, embedding_type, head_type, per_layer_type)
    embedding, head = f"{family.embedding}.weight", f"{family.head}.weight"
    embedding_type, head_type = embedding_type and embedding_type.lower(), head_type and head_type.lower()
    shapes = family.tensor_shapes()
    names = family.linear_weights()
    if not is_mixed(bits):
        linears = {name: _own_or_fallback(int(bits), shapes[name][1]) for name in names}
    elif sensitivity is None:
        raise ValueError("a mixture needs the layers' sensitivity")
    else:
        linears = _mixture(family, bits, sensitivity)
    default = _below(HEAD_TYPES if family.tied_embeddings else EMBEDDING_TYPES, bits)
    tables = {embedding: fitting_type(embedding_type or default, shapes[embedding][1])}
    if not family.tied_embeddings:
        tables[head] = fitting_type(head_type or _below(HEAD_TYPES, bits), shapes[head][1])
    if family.per_layer_width:
        table, projection = f"{family.per_layer_table}.weight", f"{family.per_layer_projection}.weight"
        kind = per_layer_type.lower() if per_layer_type else _below(PER_LAYER_TYPES, bits)
        tables[table] = _fitting(kind, shapes[table][1])
        tables[projection] = fitting_type(PER_LAYER_PROJECTION, shapes[projection][1])
    return TypePlan(linears, tables, {name: shapes[name] for name in (*tables, *linears)})


def _check_per_layer_type(family: Family, kind: str) -> None:
    if not family.per_layer_width:
        raise D2QError("--per-layer-type is for embeddings that every block has for itself, which this model has not")
    known = (*STOCK_TYPES, *(own[0].name for own in OWN_TYPES.values()))
    if kind not in known:
        raise D2QError(f"--per-layer-type {kind!r} isn't a type that can be written; these are: {', '.join(known)}")


def _fitting(kind: str, width: int) -> str:
    """Return a stock type or the first one of OWN_TYPES as this width needs it."""
    bits = next((bits for bits, own in OWN_TYPES.items() if own[0].name == kind), None)
    return fitting_type(kind, width) if bits is None else _own_or_fallback(bits, width)


def _own_or_fallback(bits: int, width: int) -> str:
    for own in OWN_TYPES[bits]:
        if width % own.block_size == 0:
            return own.name
    return fitting_type(FALLBACK, width)


def _choices(width: int) -> tuple[str, ...]:
    """Return the types that a linear layer of this width may have in a mixture, the smallest first."""
    for family in zip(*OWN_TYPES.values(), strict=True):
        if width % family[0].block_size == 0:
            return (*(own.name for own in family), Q4_0.name)
    return (fitting_type(FALLBACK, width),)


def _mixture(family: Family, bits: float, sensitivity: Mapping[str, float]) -> dict[str, str]:
    """Choose the types of all linear layers with the least sum of KL divergences within the budget."""
    items: list[Sequence[Choice]] = []
    shapes, groups = family.tensor_shapes(), choosable(family)
    for name, parts in groups.items():
        size, kinds = len(parts) * math.prod(shapes[parts[0]]), _choices(shapes[parts[0]][1])
        # A layer without a choice costs what it costs.
        unit = sensitivity.get(name, 0.0) / SQUARED_ERROR.get(kinds[0], 1.0)
        items.append([Choice(round(size * _bits(k)), unit * SQUARED_ERROR.get(k, 0.0)) for k in kinds])
    names = family.linear_weights()
    taken = allocate(items, _budget(bits, sum(math.prod(shapes[name]) for name in names)))
    types = {
        part: _choices(shapes[part][1])[index]
        for parts, index in zip(groups.values(), taken, strict=True)
        for part in parts
    }
    return {name: types[name] for name in names}


def _budget(bits: float, weights: int) -> int:
    """Return the bits that the linear layers may take."""
    return math.floor(max(bits, D2Q2.bits_per_weight) * weights)


def _below(choices: tuple[tuple[float, str], ...], bits: float) -> str:
    return next(kind for limit, kind in choices if bits < limit)


def _bits(kind: str) -> float:
    block, size = block_and_type_size(kind)
    return 8 * size / block
