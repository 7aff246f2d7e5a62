"""Products of float32 matrices against float64."""

import pytest
import torch

from d2q_edge.quantize.matmul import (
    ACCELERATOR_STRIP,
    GRAM_STRIP,
    add_gram,
    add_product,
    has_bfloat16,
    integer_product,
    matmul_precision,
    mirrored,
    product,
)

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
]


@pytest.mark.parametrize("device", DEVICES)
def test_product_is_nearly_exact(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(300, 700, generator=generator) * torch.logspace(-3, 3, 700)
    right = torch.randn(700, 200, generator=generator) * torch.logspace(3, -3, 700)[:, None]
    found = product(left.to(device), right.to(device)).cpu().double()
    exact = left.double() @ right.double()
    size = left.double().abs() @ right.double().abs()
    assert float(((found - exact).abs() / size).max()) < 2**-20


@pytest.mark.parametrize("device", DEVICES)
def test_product_with_integers_is_nearly_exact(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randint(-1023, 1024, (300, 700), generator=generator).float()
    right = torch.randn(700, 200, generator=generator) * torch.logspace(3, -3, 700)[:, None]
    found = integer_product(left.to(device), right.to(device)).cpu().double()
    exact = left.double() @ right.double()
    size = left.double().abs() @ right.double().abs()
    assert float(((found - exact).abs() / size).max()) < 2**-20


@pytest.mark.parametrize("columns", [8, GRAM_STRIP, 2 * GRAM_STRIP + 40, ACCELERATOR_STRIP + 200])
@pytest.mark.parametrize("device", DEVICES)
def test_sums_of_products(device: str, columns: int) -> None:
    """Over two batches; where products are bfloat16's, only their factors are rounded, not the sums."""
    rounded = torch.bfloat16 if has_bfloat16(torch.device(device)) else torch.float32
    generator = torch.Generator().manual_seed(0)
    total, gram = torch.zeros(2, columns, columns, device=device)
    exact, exact_gram = torch.zeros(2, columns, columns, dtype=torch.float64)
    for tokens in (30, 100):
        left, right = torch.randn(2, tokens, columns, generator=generator)
        add_product(total, left.to(device), right.to(device))
        add_gram(gram, left.to(device))
        left, right = left.to(rounded).double(), right.to(rounded).double()
        exact += left.T @ right
        exact_gram += left.T @ left
    torch.testing.assert_close(total.cpu().double(), exact, rtol=1e-5, atol=1e-4)
    found = mirrored(gram).cpu()
    torch.testing.assert_close(found.double(), exact_gram, rtol=1e-5, atol=1e-4)
    assert torch.equal(found, found.T)


def test_precision_is_set_back() -> None:
    before = torch.get_float32_matmul_precision()
    with matmul_precision("high"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
