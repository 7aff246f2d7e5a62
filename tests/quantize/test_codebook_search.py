"""The fast codebook search against the exhaustive one."""

import pytest
import torch

from d2q_edge.formats.tensor_types import ALL, D2Q2, D2Q3, TensorType
from d2q_edge.quantize.codebook_search import CodebookSearch, stored_scale
from tests.quantize.slow_trellis import nearest_errors

pytestmark = pytest.mark.usefixtures("either")


def exhaustive(search: CodebookSearch, vectors: torch.Tensor) -> torch.Tensor:
    """Least error of every group over all codebooks, entry by entry in float64: [groups]."""
    levels = search.levels.double()
    if search.tensor_type.windowed:
        table = levels[:, :, 0].numpy()
        return torch.tensor([nearest_errors(group, table).min() for group in vectors[:, :, 0].double().numpy()])
    best = torch.full((len(vectors),), torch.inf, dtype=torch.float64)
    for codebook in levels:
        distance = (vectors.double()[:, :, None] - codebook).square().sum(3).amin(2).sum(1)
        best = torch.minimum(best, distance)
    return best


def samples(kind: TensorType, name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(64, kind.block_size, generator=generator)
    if name == "heavy":
        return normal / torch.rand(normal.shape, generator=generator).clamp(min=0.02)
    if name == "outlier":
        normal[:, 5] *= 30
    return normal


@pytest.mark.parametrize("name", ["normal", "heavy", "outlier"])
@pytest.mark.parametrize("kind", [D2Q2, D2Q3], ids=lambda kind: kind.name)
def test_search_is_nearly_exhaustive(kind: TensorType, name: str) -> None:
    search = CodebookSearch(kind)
    weights = samples(kind, name)
    scales = search.block_scales(weights)
    vectors = search.vectors(weights / scales[:, None])
    codebooks, errors = search.search(vectors)
    best = exhaustive(search, vectors)
    # The reported error is that of the reported codebook.
    own = (vectors - search.nearest(vectors, codebooks)[0]).square().sum((1, 2))
    torch.testing.assert_close(errors, own, rtol=1e-3, atol=1e-2)
    assert float(errors.double().sum() / best.sum()) < (1.015 if kind.windowed else 1.002)


@pytest.mark.parametrize("name", ["normal", "heavy", "outlier"])
def test_exhaustive_search_finds_the_best(name: str) -> None:
    """Of a type whose rank is only a bound."""
    search = CodebookSearch(D2Q3, exhaustive=True)
    weights = samples(D2Q3, name)
    vectors = search.vectors(weights / search.block_scales(weights)[:, None])
    codebooks, errors = search.search(vectors)
    torch.testing.assert_close(errors.double(), exhaustive(search, vectors), rtol=1e-4, atol=1e-2)
    own = (vectors - search.nearest(vectors, codebooks)[0]).square().sum((1, 2))
    torch.testing.assert_close(errors, own, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
def test_vectors_follow_the_order_of_the_codes(kind: TensorType) -> None:
    search = CodebookSearch(kind)
    row = torch.arange(64, dtype=torch.float32)[None]
    vectors = search.vectors(row)
    if kind.paired:
        assert vectors[1, 3].tolist() == [35, 51]
    else:
        assert vectors[1, 3].tolist() == [35]


@pytest.mark.parametrize("name", ["normal", "heavy", "outlier"])
@pytest.mark.parametrize("kind", [D2Q2, D2Q3], ids=lambda kind: kind.name)
@pytest.mark.parametrize("thoroughly", [False, True])
def test_block_scales_are_near_the_best_of_a_dense_grid(kind: TensorType, name: str, thoroughly: bool) -> None:
    search = CodebookSearch(kind, exhaustive=thoroughly)
    weights = samples(kind, name)

    def error(scales: torch.Tensor) -> torch.Tensor:
        _, errors = search.search(search.vectors(weights / scales[:, None]))
        return (errors.view(len(weights), -1).sum(1) * scales.square()).double()

    base = weights.square().mean(1).sqrt() / search.unit
    grid = torch.stack([error(stored_scale(base * factor)) for factor in torch.linspace(0.5, 2.4, 40)])
    # A windowed type's error is less smooth: a dense grid finds what is good by chance, too.
    limit = 1.05 if kind.windowed else 1.02
    assert float(error(search.block_scales(weights)).sum() / grid.amin(0).sum()) < limit


def test_scales_can_be_stored() -> None:
    search = CodebookSearch(D2Q2)
    weights = torch.stack([torch.zeros(256), torch.full((256,), 1e-12), torch.full((256,), 1e9)])
    scales = search.block_scales(weights)
    assert bool(scales.isfinite().all())
    assert bool((scales > 0).all())
    assert bool((scales.half().float() == scales).all())
