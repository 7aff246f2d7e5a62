"""Dual-Scale Quantizer: column scales that cost no bits, because a neighbour absorbs them (D2Quant section 3.2).

W_ij = c_j * L_i(q_ij): beside what a row's blocks store, every column has a scale c_j. The layer keeps W / c, and what
makes its input is multiplied by c: the norm before it (its weight and bias), or the rows of the linear layer that its
input is proportional to (up for down, v for o). In exact arithmetic the block computes what it did before.

The paper fits c to the weights of down alone. Here c follows from what the quantizer does with it: a block's error is
spread evenly over its columns and grows with the mean square of W / c, so that the layer's output gets the error

    sum_j h_j c_j^2 * sum_j w_j / c_j^2,   w_j = sum_i W_ij^2,   h_j = 1 / inv(H)_jj,

which is least for c_j^2 = sqrt(w_j / h_j) (BALANCE one half; 1 is weight-only, 0 activation-only). h_j is what is left
of input j's energy when the other inputs have explained what they can, as error feedback lets them; with H's diagonal
in its place, as without error feedback (AWQ, arXiv 2306.00978), the result was a little worse. Scaling a channel up in
the weights and down in the input, which is what outlier channels are, changes c by the same factor and W / c not at
all. Knows one linear group of a block (layers that share an input); pipeline.py says which, and collects the input.
"""

from collections.abc import Sequence

import torch
from torch import nn

from d2q_edge.errors import D2QError
from d2q_edge.quantize.cholesky import inverse_lower, solved_columns
from d2q_edge.quantize.matmul import prefers_products

BALANCE = 0.5
"""Share of the weights in the scale, the rest is the input's."""
DAMPING = 0.01
"""Share of each diagonal element of H that is added to it; unlike a share of their mean, it scales with the channel."""
RANGE = 1e4
"""Scales stay within this factor of their geometric mean; only columns that hardly matter would go beyond."""


def column_scales(
    weight_energy: torch.Tensor,
    input_energy: torch.Tensor,
    rows: torch.Tensor | None = None,
    balance: float = BALANCE,
) -> torch.Tensor:
    """The scale of every column.

    Args:
        weight_energy: w, float32 [columns]: sum of the squared weights of a column, over all layers of the linear group.
        input_energy: h, float32 [columns], from InputEnergy.
        rows: int64 [columns], the row of the source layer behind each column; columns of one row share their scale.
            None where every column has its own.
        balance: see BALANCE.

    Returns:
        float32 [columns], geometric mean 1; columns without weights or without input have scale 1.
    """
    if rows is not None:
        weight_energy, input_energy = _pooled(weight_energy, rows), _pooled(input_energy, rows)
    live = (weight_energy > 0) & (input_energy > 0)
    logs = (balance * weight_energy.log() - (1 - balance) * input_energy.log()) / 2
    logs = torch.where(live, logs, 0.0)
    logs = torch.where(live, logs - logs.sum() / live.sum().clamp(min=1), 0.0)
    limit = torch.tensor(RANGE).log().item()
    return logs.clamp(-limit, limit).exp()


class InputEnergy:
    """Gathers the input of a linear group's layers, and tells how much of each of its channels the others don't explain."""

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.gram = torch.zeros(columns, columns, device=device)
        self.tokens = torch.zeros((), device=device)

    @property
    def sums(self) -> list[torch.Tensor]:
        """What was summed, to be added up with the sums of other processes."""
        return [self.gram, self.tokens]

    def add_batch(self, inputs: torch.Tensor) -> None:
        """Add float32 [..., columns]."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        self.gram += rows.T @ rows
        self.tokens += len(rows)

    def conditional(self) -> torch.Tensor:
        """What is left of every input's mean square when the other inputs have explained what they can.

        Returns:
            1 / inv(H)_jj, float32 [columns]; zero where the input is always zero.

        Raises:
            D2QError: H can't be factored even in double precision with strong damping.
        """
        # An expert may have seen no tokens.
        tokens = self.tokens.clamp(min=1)
        energy = self.gram.diagonal() / tokens
        # Channels of unit energy: the inverse is then as well conditioned as it can be.
        deviation = torch.where(energy > 0, energy, 1.0).sqrt()
        correlation = self.gram / tokens
        correlation /= deviation
        correlation /= deviation[:, None]
        correlation.diagonal().fill_(1 + DAMPING)
        factor, failed = torch.linalg.cholesky_ex(correlation)
        if failed:
            # Rounding in the sums has made it indefinite, by less than that.
            correlation = correlation.cpu().double()
            correlation.diagonal().add_(9 * DAMPING)
            factor, failed = torch.linalg.cholesky_ex(correlation)
        if failed:
            raise D2QError(
                "the calibration statistics of a layer can't be factored; use more or more varied --calibration text"
            )
        # With C = L L^T the diagonal of inv(C) is that of inv(L)^T inv(L). A solver takes L as a whole, because strips
        # would round differently.
        products = prefers_products(factor.device)
        inverse = inverse_lower(factor) if products else solved_columns(factor, 0, len(factor))
        return energy / inverse.square().sum(0).to(energy)


def weight_energy(layers: Sequence[nn.Module], shares: Sequence[torch.Tensor] | None = None) -> torch.Tensor:
    """Sum of the squared weights of each input column, over all layers: float32 [columns].

    Args:
        layers: linear layers that share an input.
        shares: the part of the tokens that each layer sees, by which its errors count; None where all see all tokens.
    """
    energies = [_tensor(layer.weight).square().sum(0) for layer in layers]
    if shares is not None:
        energies = [energy * share for energy, share in zip(energies, shares, strict=True)]
    return torch.stack(energies).sum(0)


def absorb(
    layers: Sequence[nn.Module],
    maker: nn.Module,
    scales: torch.Tensor,
    rows: torch.Tensor | None = None,
    offset: float = 0.0,
) -> None:
    """Divide the layers' columns by the scales and multiply them into what makes their input, in place.

    Args:
        layers: linear layers that share an input, weights [out, columns].
        maker: the norm (rows is None) or the linear layer whose rows these columns are proportional to.
        scales: float32 [columns], equal for columns of the same row.
        rows: see column_scales.
        offset: what the maker adds to its weight before it multiplies (Family.norm_offset).
    """
    for layer in layers:
        layer.weight = nn.Parameter(_tensor(layer.weight) / scales, requires_grad=False)
    weight, bias = _tensor(maker.weight), getattr(maker, "bias", None)
    if rows is None:
        factors = scales
    else:
        factors = torch.ones(len(weight), dtype=scales.dtype, device=scales.device)
        factors[rows] = scales
    factor = factors.view(-1, *[1] * (weight.dim() - 1))
    scaled = weight * factor if offset == 0 else (weight + offset) * factor - offset
    maker.weight = nn.Parameter(scaled, requires_grad=False)
    if bias is not None:
        maker.bias = nn.Parameter(bias * factors, requires_grad=False)


def _pooled(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Replace every column's value by the sum over the columns of the same row."""
    # On the CPU: GPUs add in another order every time, and the file would differ in more than the last bit of a scale.
    rows, device = rows.cpu(), values.device
    sums = torch.zeros(int(rows.max()) + 1, dtype=values.dtype)
    return sums.index_add_(0, rows, values.cpu())[rows].to(device)


def _tensor(value: object) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError("a layer without weights can't have column scales")
    return value
