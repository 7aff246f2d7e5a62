"""Descend along a gradient by Adam (Kingma and Ba, arXiv 1412.6980), whose moments are kept in bfloat16.

A step is computed in float32; only what the next step starts from is rounded.
"""

import torch

BETAS = (0.9, 0.99)
EPSILON = 1e-8
KEPT = torch.bfloat16
"""Dtype of the moments between two steps."""


def corrected(rate: float, number: int) -> tuple[float, float]:
    """Return what `Moments.step` takes for step `number`, counted from 1: both means begin with zeros.

    Returns:
        The rate over the share of gradients in the mean, and one over that in the mean of their squares.
    """
    return rate / (1 - BETAS[0] ** number), 1 / (1 - BETAS[1] ** number)


class Moments:
    """Running means of one parameter's gradients and of their squares.

    Attributes:
        mean, square: bfloat16, of the parameter's shape.
    """

    def __init__(self, parameter: torch.Tensor) -> None:
        """Begin with zeros, on the parameter's device."""
        self.mean, self.square = (torch.zeros_like(parameter, dtype=KEPT) for _ in range(2))

    @torch.no_grad()
    def step(
        self, parameter: torch.Tensor, gradient: torch.Tensor, rate: torch.Tensor, correction: torch.Tensor
    ) -> None:
        """Move a parameter, float32, in place, by its gradient.

        Args:
            parameter, gradient: float32, of one shape.
            rate, correction: from `corrected`, as tensors of no dimensions, which a captured step reads anew.
        """
        mean, square = (kept.to(torch.float32, copy=True) for kept in (self.mean, self.square))
        mean.lerp_(gradient, 1 - BETAS[0])
        square.lerp_(gradient.square(), 1 - BETAS[1])
        self.mean.copy_(mean)
        self.square.copy_(square)
        deviation = square.mul_(correction).sqrt_().add_(EPSILON)
        parameter.sub_(mean.mul_(rate).div_(deviation))
