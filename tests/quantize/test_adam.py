"""Adam against the formulas of its paper in float64."""

import numpy as np
import pytest
import torch

from d2q_edge.quantize.adam import BETAS, EPSILON, KEPT, Moments, corrected


def test_against_the_paper() -> None:
    """Twenty steps with moments that are rounded to bfloat16 in between, as the class says."""
    generator = torch.Generator().manual_seed(0)
    parameter = torch.randn(50, generator=generator)
    wanted, mean, square = parameter.double().numpy().copy(), np.zeros(50), np.zeros(50)
    moments = Moments(parameter)
    for number in range(1, 21):
        gradient = torch.randn(50, generator=generator) + 0.5
        rate = 0.1 / number
        moments.step(parameter, gradient, *torch.tensor(corrected(rate, number)))
        given = gradient.double().numpy()
        mean = BETAS[0] * mean + (1 - BETAS[0]) * given
        square = BETAS[1] * square + (1 - BETAS[1]) * given**2
        off = np.sqrt(square / (1 - BETAS[1] ** number)) + EPSILON
        wanted -= rate * mean / (1 - BETAS[0] ** number) / off
        mean, square = (torch.from_numpy(each).to(KEPT).double().numpy() for each in (mean, square))
    # A float32 may round to the other bfloat16.
    np.testing.assert_allclose(parameter.numpy(), wanted, rtol=2e-3, atol=2e-3)
    assert moments.mean.dtype == moments.square.dtype == KEPT == torch.bfloat16


def test_the_first_step_is_the_rate() -> None:
    parameter = torch.zeros(3)
    Moments(parameter).step(parameter, torch.tensor([5.0, -1e-3, 0.0]), *torch.tensor(corrected(0.25, 1)))
    assert parameter.tolist() == pytest.approx([-0.25, 0.25, 0.0], rel=1e-4)
