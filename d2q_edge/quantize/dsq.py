"""Scale columns at no cost in bits: a neighboring layer absorbs the scales (Dual-Scale Quantizer, D2Quant, 3.2).

W_ij = c_j * L_i(q_ij): every column has a scale c_j. The layer stores W / c, and c moves into whatever produces its
input: the weight and bias of the norm before it, or the rows of the linear layer that its input is proportional to (up
for down, v for o).

The paper fits c to the weights of down alone. Here c minimizes the expected error of the layer's output. A block's
error is spread evenly over its columns and grows with the mean square of W / c, so that the output's error is

    sum_j h_j c_j^2 * sum_j w_j / c_j^2,    w_j = sum_i W_ij^2,    h_j = 1 / inv(H)_jj,

which is least for c_j^2 = sqrt(w_j / h_j) (BALANCE one half; 1 is weight-only, 0 activation-only). h_j is what error
feedback leaves of input j, the part that the other inputs don't explain; with diag(H) instead, as in AWQ (arXiv
2306.00978), the result was slightly worse. An outlier channel, larger in the weights and smaller in the input by the
same factor, changes c by that factor and leaves W / c as it is.
"""

from collections.abc import Sequence

import torch
from torch import nn

from d2q_edge.errors import D2QError
from d2q_edge.quantize import matmul
from d2q_edge.quantize.cholesky import inverse_columns, inverse_lower
from d2q_edge.quantize.matmul import add_gram, mirrored

BALANCE = 0.5
"""Exponent of the weights' energy in c^4; the rest is the input's."""
DAMPING = 0.01
"""Share of each diagonal element of H that is added to it; unlike a share of their mean, it scales with the channel."""
RANGE = 1e4
"""Scales are clamped to this factor around their geometric mean; only columns that hardly matter are beyond it."""


def column_scales(
    weight_energy: torch.Tensor, input_energy: torch.Tensor, rows: torch.Tensor | None = None, balance: float = BALANCE
) -> torch.Tensor:
    """Return c, float32 [columns], of geometric mean 1; columns without weights or without input have scale 1.

    Args:
        weight_energy: w, float32 [columns], from the function of that name.
        input_energy: h, float32 [columns], from InputEnergy.
        rows: int64 [columns], the source layer's row that produces each column; columns of one row share a scale.
            None where every column has its own.
        balance: see BALANCE.
    """
    if rows is not None:
        weight_energy, input_energy = _sum_by_row(weight_energy, rows), _sum_by_row(input_energy, rows)
    live = (weight_energy > 0) & (input_energy > 0)
    logs = (balance * weight_energy.log() - (1 - balance) * input_energy.log()) / 2
    logs = torch.where(live, logs, 0.0)
    logs = torch.where(live, logs - logs.sum() / live.sum().clamp(min=1), 0.0)
    limit = torch.tensor(RANGE).log().item()
    return logs.clamp(-limit, limit).exp()


class InputEnergy:
    """The second moments of a linear group's input, and what remains of each channel given the others."""

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.gram = torch.zeros(columns, columns, device=device)
        self.tokens = torch.zeros((), device=device)

    @property
    def sums(self) -> list[torch.Tensor]:
        """The accumulators, for an all_reduce over the processes that share the batches."""
        return [self.gram, self.tokens]

    def add_batch(self, inputs: torch.Tensor) -> None:
        """Add a batch, float32 [..., columns]."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        add_gram(self.gram, rows)
        self.tokens += len(rows)

    def conditional(self) -> torch.Tensor:
        """Return 1 / inv(H)_jj, float32 [columns], the mean square of every input that the others don't explain.

        Raises:
            D2QError: H can't be factored even in float64 with strong damping.
        """
        # An expert may have seen no tokens.
        tokens = self.tokens.clamp(min=1)
        energy = self.gram.diagonal() / tokens
        # Channels of unit energy make the matrix as well conditioned as it can be.
        deviation = torch.where(energy > 0, energy, 1.0).sqrt()
        correlation = mirrored(self.gram / tokens)
        correlation /= deviation
        correlation /= deviation[:, None]
        correlation.diagonal().fill_(1 + DAMPING)
        lower, failed = torch.linalg.cholesky_ex(correlation)
        if failed:
            # Rounding in the sums has made it slightly indefinite.
            correlation = correlation.cpu().double()
            correlation.diagonal().add_(9 * DAMPING)
            lower, failed = torch.linalg.cholesky_ex(correlation)
        if failed:
            raise D2QError(
                "the calibration statistics of a layer can't be factored; use more or more varied --calibration text"
            )
        # With C = L L^T the diagonal of inv(C) is that of inv(L)^T inv(L). The solver takes L as a whole: strips round
        # differently.
        accelerator = matmul.is_accelerator(lower.device)
        inverse = inverse_lower(lower) if accelerator else inverse_columns(lower, slice(0, len(lower)))
        return energy / inverse.square().sum(0).to(energy)


def weight_energy(layers: Sequence[nn.Module], shares: Sequence[torch.Tensor] | None = None) -> torch.Tensor:
    """Sum the squared weights of each input column over layers that share an input: float32 [columns].

    `shares` are the parts of the tokens that the layers see, which weight their errors; None where all see all tokens.
    """
    energies = [layer.get_parameter("weight").square().sum(0) for layer in layers]
    if shares is not None:
        energies = [energy * share for energy, share in zip(energies, shares, strict=True)]
    return torch.stack(energies).sum(0)


def absorb(
    layers: Sequence[nn.Module],
    absorber: nn.Module,
    scales: torch.Tensor,
    rows: torch.Tensor | None = None,
    offset: float = 0.0,
) -> None:
    """Divide the layers' columns by the scales, and multiply the module that produces their input by them, in place.

    Args:
        layers: linear layers that share an input, weights [out, columns].
        absorber: the norm (rows is None) or the linear layer whose rows the input is proportional to.
        scales: float32 [columns], equal for columns of the same row.
        rows: see column_scales.
        offset: what the absorber adds to its weight before it multiplies (Gemma's norms: 1).
    """
    for layer in layers:
        layer.weight = nn.Parameter(layer.get_parameter("weight") / scales, requires_grad=False)
    weight, bias, factors = absorber.get_parameter("weight"), getattr(absorber, "bias", None), scales
    if rows is not None:
        factors = torch.ones(len(weight), dtype=scales.dtype, device=scales.device)
        factors[rows] = scales
    factor = factors.view(-1, *[1] * (weight.dim() - 1))
    scaled = weight * factor if offset == 0 else (weight + offset) * factor - offset
    absorber.weight = nn.Parameter(scaled, requires_grad=False)
    if bias is not None:
        absorber.bias = nn.Parameter(bias * factors, requires_grad=False)


def _sum_by_row(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Replace every column's value by the sum over the columns of the same row."""
    # On the CPU, because GPUs add in another order every time, and the files would differ.
    rows, device = rows.cpu(), values.device
    sums = torch.zeros(int(rows.max()) + 1, dtype=values.dtype)
    return sums.index_add_(0, rows, values.cpu())[rows].to(device)
