"""Choose scales and codebooks of llama.cpp's q4_0, whose values are evenly spaced, so that there is no table to search.

A block of 32 weights has one scale d and the values d * (-8 .. 7) (codebook 0) or d * (-7 .. 8) (codebook 1).
"""

import torch

ENTRIES = 16
LOWEST = (-8.0, -7.0)
"""Smallest entry of each codebook."""
SCALE_STEPS = tuple(1 / (8 + step) for step in (0.8, 0.4, 0.0, -0.4, -0.8, -1.2, -1.6, -2.0, -2.4, -2.8))
"""Scales that are tried, as multiples of a block's largest magnitude, which less than 1/8 clips."""


def levels(device: torch.device | str) -> torch.Tensor:
    """Return both codebooks in units of d: float32 [2, 16, 1]."""
    first = torch.arange(ENTRIES, dtype=torch.float32, device=device)
    return torch.stack([first + lowest for lowest in LOWEST])[:, :, None]


def search(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the better codebook of each group [groups, 32, 1], as CodebookSearch.search."""
    values = vectors[:, :, 0]
    nearest = values.round()
    errors = [(nearest.clamp(lowest, lowest + ENTRIES - 1) - values).square().sum(1) for lowest in LOWEST]
    least, codebooks = torch.stack(errors, 1).min(1)
    return codebooks, least


def block_scales(blocks: torch.Tensor) -> torch.Tensor:
    """Choose the scale of each block [rows, 32], positive and not rounded: the best of SCALE_STEPS after a refit."""
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
            # The squared error at the least-squares d, less the sum of w^2. NaN where all codes are zero: never better.
            error = -fitted.square() * power
            better = error < best
            best, scales = torch.where(better, error, best), torch.where(better, fitted, scales)
    return scales
