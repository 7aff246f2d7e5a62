"""Deviation-Aware Correction: the mean shift that quantizing causes at a norm's output (D2Quant section 3.3).

The bias is the mean over calibration tokens of teacher - student, both at the norm's output: the student is the model
with everything before the norm quantized, the teacher gets the same input through the unquantized layers. Later layers
are calibrated with the bias in place, so that they see it.

Knows pairs of activations. A mean over tokens is an estimate; correcting what is only noise adds an error of its
own, so that part of the windows is held back: a channel is corrected only if the shift found on the others makes its
squared error smaller on them, and a norm only if the channels together gain more than MINIMUM_GAIN.
"""

from dataclasses import dataclass

import torch

VALIDATION_EVERY = 4
"""Every fourth batch is held back."""
SIGNAL = 1e-3
"""A channel's shift mu is signal where mu^2 / (mu^2 + sigma^2) is above this; sigma over tokens."""
MINIMUM_GAIN = 1e-3
"""Smallest relative reduction of the squared error on the held-back batches that makes a bias worth its bytes."""


@dataclass(frozen=True)
class ShiftFacts:
    """What was found out about one norm.

    Attributes:
        applied: whether the norm gets a bias.
        norm: length of the mean shift, over all channels and batches.
        relative_norm: the same relative to the norm's output (root of the mean squared length over tokens).
        signal_to_noise: squared length of the mean shift over the variance of the shift between tokens.
        gain: by how much a bias in the chosen channels makes the squared error on the held-back batches smaller,
            relative to it.
        channels: that were chosen.
    """

    applied: bool
    norm: float
    relative_norm: float
    signal_to_noise: float
    gain: float
    channels: int


class MeanShift:
    """The guarded bias of one norm, from batches of activations."""

    def __init__(self, channels: int, batches: int) -> None:
        """Begin.

        Args:
            channels: of the norm.
            batches: how many there are in all. With fewer than two nothing can be held back, and nothing is corrected.
        """
        self._batches = batches
        self.moments = torch.zeros(2, 4, channels, dtype=torch.float64)
        """Of the batches that fit and of those that are held back; sums, so that those of several processes add up."""

    def add_batch(self, index: int, teacher: torch.Tensor, student: torch.Tensor) -> None:
        """Add batch number `index`: float32 [..., channels] of the same tokens."""
        held = (
            index == self._batches - 1
            if self._batches < VALIDATION_EVERY
            else index % VALIDATION_EVERY == VALIDATION_EVERY - 1
        )
        self.moments[int(held)] += _moments((teacher - student).flatten(0, -2), teacher.flatten(0, -2))

    def bias(self) -> torch.Tensor | None:
        """float32 [channels], on the CPU, zero in channels that stay as they are; None where the norm is better left
        alone."""
        chosen, gain = self._choice()
        if not gain > MINIMUM_GAIN:
            return None
        every = self.moments.sum(0)
        return torch.where(chosen, every[1] / every[0], 0.0).float()

    def facts(self) -> ShiftFacts:
        """What people may want to know about it."""
        chosen, gain = self._choice()
        count, total, square, energy = self.moments.sum(0)
        shift = total / count
        signal, noise = float(shift.square().sum()), float((square / count - shift.square()).sum())
        output = float((energy / count).sum())
        return ShiftFacts(
            applied=gain > MINIMUM_GAIN,
            norm=signal**0.5,
            relative_norm=(signal / output) ** 0.5 if output > 0 else 0.0,
            signal_to_noise=signal / noise if noise > 0 else 0.0,
            gain=gain,
            channels=int(chosen.sum()),
        )

    def _choice(self) -> tuple[torch.Tensor, float]:
        """Channels that are corrected, bool [channels], and what they gain together on the held-back batches."""
        if self._batches < 2:
            return torch.zeros(self.moments.shape[2], dtype=torch.bool), 0.0
        fitted, checked = self.moments
        shift, square = fitted[1] / fitted[0], fitted[2] / fitted[0]
        shift_there, square_there = checked[1] / checked[0], checked[2] / checked[0]
        # E[(d - m)^2] = E[d^2] - 2 m E[d] + m^2
        gain = shift * (2 * shift_there - shift)
        chosen = (gain > 0) & (shift.square() > SIGNAL * square)
        total = float(torch.where(chosen, gain, 0.0).sum() / square_there.sum())
        # Without any error there is nothing to gain, and no number either.
        return chosen, total if total == total else 0.0


def _moments(difference: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Over a batch: count, sum, sum of squares, teacher's sum of squares; float64 [4, channels], on the CPU."""
    count = torch.full_like(difference[0], len(difference))
    sums = difference.sum(0), difference.square().sum(0), teacher.square().sum(0)
    return torch.stack([count, *sums]).cpu().double()
