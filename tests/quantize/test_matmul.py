"""Products of float32 matrices against float64."""

import pytest
import torch

from d2q_edge.quantize.matmul import integer_product, matmul_precision, product

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


def test_precision_is_set_back() -> None:
    before = torch.get_float32_matmul_precision()
    with matmul_precision("high"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
