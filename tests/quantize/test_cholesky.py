"""The factor of the inverse Hessian against numpy in float64, and the products with triangular matrices."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from d2q_edge.errors import D2QError
from d2q_edge.quantize.cholesky import (
    STRIP,
    inverse_cholesky,
    inverse_lower,
    times_upper,
    times_upper_transposed,
    upper_times_upper,
)
from d2q_edge.quantize.collective import SingleProcess

SIZES = pytest.mark.parametrize("size", [50, STRIP + 76], ids=["one strip", "two strips"])
DEVICES = pytest.mark.parametrize("accelerator", [False, True], ids=["solver", "products"])


def random(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@DEVICES
@SIZES
def test_inverse_cholesky_is_the_factor_of_the_damped_inverse(
    size: int, accelerator: bool, request: pytest.FixtureRequest
) -> None:
    if accelerator:
        request.getfixturevalue("accelerated")
    x = random(4 * size, size) * torch.linspace(0.1, 10, size)
    hessian = x.T @ x
    found, damping = inverse_cholesky(hessian, 0.01)
    h = hessian.double().numpy()
    added = 0.01 * h.diagonal().mean()
    assert float(damping) == pytest.approx(added)
    expected = np.linalg.cholesky(np.linalg.inv(h + added * np.eye(size))).T
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5 * expected.max())
    assert bool((found.tril(-1) == 0).all())


class FailedElsewhere(SingleProcess):
    """A group with a process whose first factorizations fail; the factorization's status is all that is reduced."""

    def __init__(self, failures: int) -> None:
        self.failures, self.calls = failures, 0

    def all_reduce(self, tensors: Sequence[torch.Tensor], /) -> None:
        self.calls += 1
        tensors[0].add_(int(self.calls <= self.failures))


@pytest.mark.parametrize(("failures", "share"), [(1, 0.01), (2, 0.1)])
def test_when_it_fails_more_digits_then_more_damping(failures: int, share: float) -> None:
    x, processes = random(9, 50) * torch.linspace(0.01, 10, 50), FailedElsewhere(failures)
    found, damping = inverse_cholesky(x.T @ x, 0.01, processes)
    assert processes.calls == failures + 1
    assert float(damping) == pytest.approx(share * float((x.T @ x).diagonal().mean()))
    damped = (x.T @ x).double() + damping.double() * torch.eye(50, dtype=torch.float64)
    expected = torch.linalg.cholesky(damped.inverse(), upper=True).float()
    in_float32, _ = inverse_cholesky(x.T @ x, share)

    def difference(factor: torch.Tensor) -> float:
        return float((factor - expected).abs().max() / expected.max())

    # Rounded once, at the end.
    assert difference(found) < 1e-7 < 3e-7 < difference(in_float32)


@pytest.mark.parametrize("hessian", [torch.zeros(8, 8), torch.eye(8) * torch.nan], ids=["zero", "nan"])
def test_what_cannot_be_factored_is_an_error(hessian: torch.Tensor) -> None:
    with pytest.raises(D2QError, match="can't be factored"):
        inverse_cholesky(hessian, 0.01)


@DEVICES
@pytest.mark.parametrize(
    "size",
    [70, STRIP + 76, pytest.param(2 * STRIP + 76, marks=pytest.mark.slow)],
    ids=["one strip", "two strips", "three strips"],
)
def test_inverse_lower(size: int, accelerator: bool, request: pytest.FixtureRequest) -> None:
    if accelerator:
        request.getfixturevalue("accelerated")
    lower = random(size, size).tril() / size**0.5 + torch.eye(size)
    found = inverse_lower(lower)
    product = found.double() @ lower.double()
    torch.testing.assert_close(product, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-4)
    assert bool((found.triu(1) == 0).all())


@SIZES
def test_products_with_triangles(size: int) -> None:
    left, first, second = random(5, size, 1), random(size, size, 2).triu(), random(size, size, 3).triu()
    torch.testing.assert_close(times_upper(left, second), left @ second, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(times_upper_transposed(left, second), left @ second.T, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(upper_times_upper(first, second), first @ second, rtol=1e-4, atol=1e-3)
