"""Describe the layers of a decoder block that are quantized together, its residual branches, its experts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearGroup:
    """Linear layers of one block that read the same input; all names are relative to the block, without ".weight".

    Dual-Scale Quantization (D2Quant, section 3.2) factors their weights into W[i, j] = c[j] * W'[i, j]. The column
    scales c cost no bits, because W x = W' (c * x): whatever produces the input x absorbs them. That is the norm, whose
    weight is multiplied by c, or the absorber, a linear layer A whose row `Family.absorber_rows(...)[j]` is multiplied
    by c[j]. Columns with the same row share their scale.
    """

    norm: str | None  # produces the input; None if another layer of the block, or the residual stream itself, does
    linears: tuple[str, ...]  # in forward order
    absorber: str | None = None  # without a norm: to whose rows the input's columns are proportional (v for o)
    reads_stream: bool = False  # the input is the residual stream as it is, so that nothing can absorb scales


@dataclass(frozen=True)
class Sublayer:
    """One residual branch of a block, residual + scale * output_norm(module(norm(residual))); names relative to it.

    The scale is the model's (`Family.residual_scale`). A block may multiply the sum by a number of its own.
    """

    module: str
    norm: str | None  # None where the module reads the residual stream as it is
    output_norm: str | None = None  # None where the module's output is added as it is
    stream_scale: str | None = None  # the buffer that multiplies the stream after the branch, if any


@dataclass(frozen=True)
class RoutedExperts:
    """The experts of a block, gated MLPs of one shape, to some of which a router sends each token.

    Names are relative to the block, those of the parts relative to an expert.
    """

    module: str  # of the sublayer that has the router and, as its `experts`, the experts
    router: str
    norm: str  # in front of router and experts
    count: int
    parts: tuple[str, str, str]  # gate, up and down
    shared: tuple[str, ...] = ()  # gate, up and down of an MLP beside them, which all tokens pass

    @property
    def prefix(self) -> str:
        """Return what the names of all experts' layers begin with."""
        return f"{self.module}.experts."

    def linears(self, number: int) -> tuple[str, str, str]:
        """Return the names of an expert's gate, up and down."""
        gate, up, down = (f"{self.prefix}{number}.{part}" for part in self.parts)
        return gate, up, down

    def groups(self, number: int) -> tuple[LinearGroup, LinearGroup]:
        """Return the linear groups of an expert, which is quantized by itself."""
        gate, up, down = self.linears(number)
        return LinearGroup(self.norm, (gate, up)), LinearGroup(None, (down,), absorber=up)
