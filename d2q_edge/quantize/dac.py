"""Deviation-Aware Correction: the mean shift that quantizing causes at a norm's output (D2Quant section 3.3).

The bias is the mean over calibration tokens of teacher - student, both at the norm's output: the student is the model
with everything before the norm quantized, the teacher gets the same input through the unquantized layers. Later layers
are calibrated with the bias in place, so that they see it.

Knows two lists of activations. A mean over tokens is an estimate; correcting what is only noise adds an error of its
own, so that part of the windows is held back: a channel is corrected only if the shift found on the others makes its
squared error smaller on them, and a norm only if the channels together gain more than MINIMUM_GAIN.
"""

from collections.abc import Sequence

import torch

HELD_BACK = 4
"""Every fourth batch is held back."""
SIGNAL = 1e-3
"""A channel's shift mu is signal where mu^2 / (mu^2 + sigma^2) is above this; sigma over tokens."""
MINIMUM_GAIN = 1e-3
"""Smallest relative reduction of the squared error on the held-back batches that makes a bias worth its bytes."""


def mean_shift(teacher: Sequence[torch.Tensor], student: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The guarded bias of one norm.

    Args:
        teacher, student: float32 [tokens, channels], batch by batch, of the same tokens.

    Returns:
        float32 [channels], zero in channels that stay as they are; None where the norm is better left alone. With
        fewer than two batches nothing can be held back, and nothing is corrected.
    """
    moments = torch.stack([_moments(t - s) for t, s in zip(teacher, student, strict=True)])
    held = torch.zeros(len(moments), dtype=torch.bool)
    held[HELD_BACK - 1 :: HELD_BACK] = True
    if len(moments) < HELD_BACK:
        held[-1] = True
    if held.all():
        return None
    fitted, checked = moments[~held].sum(0), moments[held].sum(0)
    shift, square = fitted[1] / fitted[0], fitted[2] / fitted[0]
    shift_there, square_there = checked[1] / checked[0], checked[2] / checked[0]
    # E[(d - m)^2] = E[d^2] - 2 m E[d] + m^2
    gain = shift * (2 * shift_there - shift)
    chosen = (gain > 0) & (shift.square() > SIGNAL * square)
    total = float(torch.where(chosen, gain, 0.0).sum() / square_there.sum())
    if not total > MINIMUM_GAIN:
        return None
    every = moments.sum(0)
    return torch.where(chosen, every[1] / every[0], 0.0).float()


def _moments(difference: torch.Tensor) -> torch.Tensor:
    """Count, sum and sum of squares over tokens: float64 [3, channels]."""
    values = difference.double()
    return torch.stack([torch.full_like(values[0], len(values)), values.sum(0), values.square().sum(0)])
