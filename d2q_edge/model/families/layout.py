"""The parts of a decoder block that are quantized and moved through one after another. Knows names only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearGroup:
    """Linear layers of one block that read the same input, in forward order.

    `norm` is the norm that makes this input, or None when the input comes from elsewhere in the block (attention
    output, gated activation). `source` is then the linear layer whose output this input is proportional to: scaling one
    of its rows scales the input's columns that `Family.source_rows` maps to that row, and nothing else. All names are
    module names relative to the block, without ".weight".
    """

    norm: str | None
    linears: tuple[str, ...]
    source: str | None = None


@dataclass(frozen=True)
class Sublayer:
    """One residual branch of a block: residual + output_norm(module(norm(residual))), by names relative to the block.

    `output_norm` is None where the module's output is added as it is.
    """

    module: str
    norm: str
    output_norm: str | None = None
