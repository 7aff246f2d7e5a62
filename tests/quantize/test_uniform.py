"""The search of q4_0 against a dense one, entry by entry in float64, and against gguf-py's encoder."""

import gguf
import numpy as np
import pytest
import torch

from d2q_edge.formats.tensor_types import Q4_0
from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.rtn import round_layer

TYPE = gguf.GGMLQuantizationType.Q4_0


def samples(name: str, rows: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(rows, 32, generator=generator)
    if name == "heavy":
        return normal / torch.rand(normal.shape, generator=generator).clamp(min=0.02)
    if name == "outlier":
        normal[:, 5] *= -30
    return normal


def exhaustive(vectors: torch.Tensor) -> torch.Tensor:
    """Summed squared error of each group [n, 32, 1] with each codebook: [n, 2]."""
    entries = torch.arange(-8, 8, dtype=torch.float64)
    distances = (vectors.double() - entries).square(), (vectors.double() - entries - 1).square()
    return torch.stack([distance.amin(2).sum(1) for distance in distances], 1)


def test_levels() -> None:
    levels = CodebookSearch(Q4_0).levels
    assert levels.shape == (2, 16, 1)
    assert levels[:, :, 0].tolist() == [list(range(-8, 8)), list(range(-7, 9))]


@pytest.mark.parametrize("name", ["normal", "heavy", "outlier"])
def test_search_is_exhaustive(name: str) -> None:
    search = CodebookSearch(Q4_0)
    weights = samples(name)
    vectors = search.vectors(weights / weights.abs().amax(1, keepdim=True) * 9)
    codebooks, errors = search.search(vectors)
    expected, which = exhaustive(vectors).min(1)
    torch.testing.assert_close(errors.double(), expected, rtol=1e-4, atol=1e-4)
    assert codebooks.tolist() == which.tolist()
    assert 0 < sum(which.tolist()) < len(weights)


@pytest.mark.parametrize("name", ["normal", "heavy", "outlier"])
def test_block_scales_are_near_the_best_of_a_dense_grid(name: str) -> None:
    search = CodebookSearch(Q4_0)
    weights = samples(name)

    def error(scales: torch.Tensor) -> torch.Tensor:
        return exhaustive(search.vectors(weights / scales[:, None])).amin(1) * scales.double().square()

    largest = weights.abs().amax(1)
    grid = torch.stack([error(largest / divisor) for divisor in torch.linspace(4, 9, 400)])
    found = search.block_scales(weights)
    assert bool((found.half().float() == found).all())
    assert float(error(found).sum() / grid.amin(0).sum()) < 1.015


def test_better_than_the_stock_encoder() -> None:
    weights = torch.randn(64, 512, generator=torch.Generator().manual_seed(4))
    packed = round_layer(weights, CodebookSearch(Q4_0)).pack(Q4_0)
    ours, stock = (
        np.square(gguf.quants.dequantize(data, TYPE) - weights.numpy()).sum()
        for data in (packed, gguf.quants.quantize(weights.numpy(), TYPE))
    )
    assert ours < 0.9 * stock


def test_odd_blocks() -> None:
    rows = [torch.zeros(32), torch.full((32,), 1e-12), torch.full((32,), -3.0), torch.full((32,), 1e9)]
    rows.append(torch.arange(32) / 31 * -7)
    weights = torch.stack(rows)
    layer = round_layer(weights, CodebookSearch(Q4_0))
    assert bool((layer.scales > 0).all()) and bool(layer.scales.isfinite().all())
    assert float(layer.weights[:2].abs().max()) < 1e-5
    torch.testing.assert_close(layer.weights[2], weights[2], rtol=1e-3, atol=0)
    assert float(layer.weights[3].min()) >= 8 * 65504 * 0.99
    assert float((layer.weights[4] - weights[4]).abs().max()) < 0.5 * 7 / 8
    packed = layer.pack(Q4_0)
    np.testing.assert_array_equal(gguf.quants.dequantize(packed, TYPE), layer.weights.numpy())
