"""The factor of the inverse Hessian against numpy in float64, and the products with triangles."""

import numpy as np
import pytest
import torch

from d2q_edge.errors import D2QError
from d2q_edge.quantize import cholesky
from d2q_edge.quantize.cholesky import (
    inverse_factor,
    inverse_lower,
    times_upper,
    times_upper_transposed,
    upper_times_upper,
)


@pytest.fixture(autouse=True, params=[16, 1000], ids=["strips", "whole"])
def strips(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cholesky, "STRIP", request.param)


def random(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("products", [False, True], ids=["solver", "products"])
def test_inverse_factor_is_the_cholesky_factor_of_the_damped_inverse(
    products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cholesky, "prefers_products", lambda _: products)
    x = random(200, 50) * torch.linspace(0.1, 10, 50)
    hessian = x.T @ x
    found, damping = inverse_factor(hessian, 0.01)
    h = hessian.double().numpy()
    added = 0.01 * h.diagonal().mean()
    assert float(damping) == pytest.approx(added)
    expected = np.linalg.cholesky(np.linalg.inv(h + added * np.eye(50))).T
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5 * expected.max())
    assert bool((found.tril(-1) == 0).all())


@pytest.mark.parametrize(("failures", "share"), [(1, 0.01), (2, 0.1)])
def test_when_it_fails_more_digits_then_more_damping(
    failures: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = torch.linalg.cholesky_ex, []

    def failing(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(matrix.dtype)
        lower, failed = real(matrix)
        return lower, failed + (len(seen) <= failures)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing)
    x = random(200, 50)
    found, damping = inverse_factor(x.T @ x, 0.01)
    assert seen == [torch.float32, torch.float64, torch.float64][: failures + 1]
    assert float(damping) == pytest.approx(share * float((x.T @ x).diagonal().mean()))
    damped = (x.T @ x + damping * torch.eye(50)).double()
    torch.testing.assert_close(found.double().T @ found.double(), damped.inverse(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("hessian", [torch.zeros(8, 8), torch.eye(8) * torch.nan], ids=["zero", "nan"])
def test_what_cannot_be_factored_is_an_error(hessian: torch.Tensor) -> None:
    with pytest.raises(D2QError, match="can't be factored"):
        inverse_factor(hessian, 0.01)


@pytest.mark.parametrize("products", [False, True], ids=["solver", "products"])
def test_inverse_lower(products: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cholesky, "prefers_products", lambda _: products)
    lower = random(70, 70).tril() / 70**0.5 + torch.eye(70)
    torch.testing.assert_close(inverse_lower(lower), torch.linalg.inv(lower), rtol=1e-4, atol=1e-5)


def test_products_with_triangles() -> None:
    left, first, second = random(5, 70, 1), random(70, 70, 2).triu(), random(70, 70, 3).triu()
    torch.testing.assert_close(times_upper(left, second), left @ second, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(times_upper_transposed(left, second), left @ second.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(upper_times_upper(first, second), first @ second, rtol=1e-4, atol=1e-4)
