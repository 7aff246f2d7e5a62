"""Scales and codebooks of q4_0: sixteen values at equal distances, so that no table has to be searched.

Knows blocks of 32 weights with one scale d and the values d * (-8 .. 7) or d * (-7 .. 8) (tensor_types.py: codebook 0
or 1). Called by CodebookSearch, which is what gptaq.py, rtn.py and descent.py see.
"""

import torch

ENTRIES = 16
LOWEST = (-8.0, -7.0)
"""Smallest entry of each codebook."""
SCALE_STEPS = tuple(1 / (8 + step) for step in (0.8, 0.4, 0.0, -0.4, -0.8, -1.2, -1.6, -2.0, -2.4, -2.8))
"""Scales that are tried, as multiples of a block's largest magnitude; less than 1/8 cuts it off."""


def levels(device: torch.device | str) -> torch.Tensor:
    """Both codebooks: float32 [2, 16, 1], in units of d."""
    first = torch.arange(ENTRIES, dtype=torch.float32, device=device)
    return torch.stack([first + lowest for lowest in LOWEST])[:, :, None]


def search(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The better codebook of each group.

    Args:
        vectors: float32 [groups, 32, 1], in units of d.

    Returns:
        int64 [groups] and float32 [groups], the summed squared errors in units of d squared.
    """
    values = vectors[:, :, 0]
    nearest = values.round()
    errors = torch.stack(
        [(nearest.clamp(lowest, lowest + ENTRIES - 1) - values).square().sum(1) for lowest in LOWEST], dim=1
    )
    least, books = errors.min(1)
    return books, least


def block_scales(blocks: torch.Tensor) -> torch.Tensor:
    """The positive scale d of each block [rows, 32], not rounded: the best of SCALE_STEPS, fitted by least squares."""
    largest = blocks.abs().amax(1).clamp(min=1e-30)
    best = torch.full_like(largest, torch.inf)
    scales = largest / 8
    for step in SCALE_STEPS:
        trial = largest * step
        values = blocks / trial[:, None]
        nearest = values.round()
        for lowest in LOWEST:
            codes = nearest.clamp(lowest, lowest + ENTRIES - 1)
            power = codes.square().sum(1)
            fitted = (codes * blocks).sum(1) / power
            # The sum of (d code - w)^2 at the fitted d, less that of w^2. NaN where all codes are zero: never better.
            error = -fitted.square() * power
            better = error < best
            best, scales = torch.where(better, error, best), torch.where(better, fitted, scales)
    return scales
