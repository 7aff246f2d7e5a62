"""Describe which layers of a decoder block are quantized together, and which are residual branches."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearGroup:
    """Linear layers of one block that read the same input; all names are relative to the block, without ".weight".

    Dual-Scale Quantization (D2Quant, section 3.2) factors their weights into W[i, j] = c[j] * W'[i, j]. The column
    scales c cost no bits, because W x = W' (c * x): whatever produces the input x absorbs them. That is the norm, whose
    weight is multiplied by c, or the absorber, a linear layer A whose row `Family.absorber_rows(...)[j]` is multiplied
    by c[j]. Columns with the same row share their scale.

    """

    norm: str | None  # produces the input; None if it comes from attention or from the gated activation
    linears: tuple[str, ...]  # in forward order
    absorber: str | None = None  # without a norm: to whose rows the input's columns are proportional (v for o)


@dataclass(frozen=True)
class Sublayer:
    """One residual branch of a block, residual + output_norm(module(norm(residual))), with names relative to it."""

    module: str
    norm: str
    output_norm: str | None = None  # None where the module's output is added as it is
