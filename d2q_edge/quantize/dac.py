"""Correct a norm's mean shift under quantization by a bias (Deviation-Aware Correction, D2Quant, 3.3).

The bias is the mean over calibration tokens of teacher - student, both at the norm's output: everything before the norm
is quantized in the student; the teacher runs the same input through the unquantized layers. Later layers are calibrated
with the bias in place.

Correcting noise would add an error of its own, so some batches are held out: a channel gets a bias only if the
shift of the other batches lowers its squared error there, and a norm only if that gains more than MINIMUM_GAIN in all.
"""

from dataclasses import dataclass

import torch

HOLDOUT_EVERY = 4
"""Every fourth batch is held out."""
SIGNAL = 1e-3
"""A channel's shift mu is signal where mu^2 / (mu^2 + sigma^2) is above this; sigma over tokens."""
MINIMUM_GAIN = 1e-3
"""Smallest relative reduction of the squared held-out error that makes a bias worth its bytes."""


@dataclass(frozen=True)
class MeanShiftStats:
    """What was measured at one norm.

    Attributes:
        applied: whether the norm gets a bias.
        norm: length of the mean shift, over all channels and batches.
        relative_norm: the same relative to the norm's output (root of the mean squared length over tokens).
        signal_to_noise: squared length of the mean shift over the variance of the shift between tokens.
        gain: relative reduction of the squared held-out error by a bias in the chosen channels.
        channels: number of chosen channels.
    """

    applied: bool
    norm: float
    relative_norm: float
    signal_to_noise: float
    gain: float
    channels: int


class MeanShift:
    """The bias of one norm, estimated from batches of activations.

    With fewer than two `batches` none is held out, and nothing is corrected.
    """

    def __init__(self, channels: int, batches: int) -> None:
        self._batches = batches
        self.moments = torch.zeros(2, 4, channels, dtype=torch.float64)
        """Count, sum and sum of squares of the shift, and sum of squares of the teacher's output, for fitting and held
        out; an all_reduce adds those of other processes."""

    def add_batch(self, index: int, teacher: torch.Tensor, student: torch.Tensor) -> None:
        """Add batch number `index`: float32 [..., channels] of the same tokens."""
        last = min(HOLDOUT_EVERY, self._batches) - 1
        held_out = index == last if self._batches < HOLDOUT_EVERY else index % HOLDOUT_EVERY == last
        shift, output = (teacher - student).flatten(0, -2), teacher.flatten(0, -2)
        count = torch.full_like(shift[0], len(shift))
        sums = torch.stack([count, shift.sum(0), shift.square().sum(0), output.square().sum(0)])
        self.moments[int(held_out)] += sums.cpu().double()

    def bias(self) -> torch.Tensor | None:
        """Return the bias, float32 [channels] on the CPU, zero in channels that aren't corrected; None for no bias."""
        chosen, gain = self._choose_channels()
        count, total, _, _ = self.moments.sum(0)
        return torch.where(chosen, total / count, 0.0).float() if gain > MINIMUM_GAIN else None

    def stats(self) -> MeanShiftStats:
        """Summarize the shift for the conversion report."""
        chosen, gain = self._choose_channels()
        count, total, square, energy = self.moments.sum(0)
        shift = total / count
        signal, noise = float(shift.square().sum()), float((square / count - shift.square()).sum())
        output = float((energy / count).sum())
        return MeanShiftStats(
            applied=gain > MINIMUM_GAIN,
            norm=signal**0.5,
            relative_norm=(signal / output) ** 0.5 if output > 0 else 0.0,
            signal_to_noise=signal / noise if noise > 0 else 0.0,
            gain=gain,
            channels=int(chosen.sum()),
        )

    def _choose_channels(self) -> tuple[torch.Tensor, float]:
        """Return which channels to correct, bool [channels], and their joint relative gain in held-out batches."""
        if self._batches < 2:
            return torch.zeros(self.moments.shape[2], dtype=torch.bool), 0.0
        fitted, held_out = self.moments
        shift, square = fitted[1] / fitted[0], fitted[2] / fitted[0]
        shift_there, square_there = held_out[1] / held_out[0], held_out[2] / held_out[0]
        # E[(d - m)^2] = E[d^2] - 2 m E[d] + m^2
        gain = shift * (2 * shift_there - shift)
        chosen = (gain > 0) & (shift.square() > SIGNAL * square)
        total = float(torch.where(chosen, gain, 0.0).sum() / square_there.sum())
        # Without any error it is 0 / 0.
        return chosen, total if total == total else 0.0
