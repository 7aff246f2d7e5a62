"""The Triton kernels against the same steps in torch: on a GPU, or else in Triton's interpreter (tests/__init__.py)."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from d2q_edge.formats.tensor_types import ALL, D2Q2, D2Q2_64, D2Q3_64, Q4_0, TensorType
from d2q_edge.quantize import codebook_search, descent, gptaq
from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.feedback import corners, diagonal_squares

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytest.importorskip("triton")

from d2q_edge.quantize.triton import codebook_search as triton_search  # noqa: E402
from d2q_edge.quantize.triton import descent as triton_descent  # noqa: E402
from d2q_edge.quantize.triton import gptaq as triton_gptaq  # noqa: E402

KINDS = pytest.mark.parametrize("kind", (*ALL, Q4_0), ids=lambda kind: kind.name)
ROWS = pytest.mark.parametrize("rows", [7, 1000, 20001] if CUDA else [7])


@pytest.fixture(autouse=True)
def programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU has matrices of all sizes here, but the interpreter is slow: both sizes of programs occur."""
    kind = request.getfixturevalue("kind") if "kind" in request.fixturenames else None
    if not CUDA:
        for module in (triton_gptaq, triton_descent):
            monkeypatch.setattr(module, "rows_per_program", lambda *_: 16 if kind in (D2Q2, D2Q3_64) else 8)


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, everything is done by torch."""

    def switch() -> None:
        for module in (codebook_search, descent, gptaq):
            monkeypatch.setattr(module, "has_triton", lambda _: False)

    return switch


@dataclass
class Block:
    """One block of columns of a matrix, in processing order, and what both moves want to know."""

    search: CodebookSearch
    weights: torch.Tensor
    factor: torch.Tensor
    lead: torch.Tensor
    hessian: torch.Tensor
    noise: torch.Tensor

    @classmethod
    def make(cls, kind: TensorType, rows: int) -> "Block":
        generator = torch.Generator().manual_seed(rows)
        size = kind.block_size

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        weights = normal(rows, size) * (0.2 + torch.rand(size, generator=generator))
        # Nothing, next to nothing, more than float16 holds, and an outlier.
        weights[:4] *= torch.tensor([0, 1e-9, 1e6, 1])[:, None]
        weights[3, 5] = 40
        wide = normal(size, 3 * size)
        parts = (
            weights,
            normal(size, size).triu(1) * 0.1 + torch.diag(1 + torch.rand(size, generator=generator)),
            normal(size, size).triu(1) * 0.05,
            wide @ wide.T / size + 0.1 * torch.eye(size),
            normal(rows, size),
        )
        return cls(CodebookSearch(kind, DEVICE), *(part.to(DEVICE) for part in parts))

    @property
    def width(self) -> int:
        return self.search.levels.shape[2]

    def inverses(self) -> torch.Tensor:
        return corners(diagonal_squares(self.factor), self.width)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def near_ties(same: torch.Tensor) -> None:
    """A few of many rows may differ."""
    assert float((~same).sum()) <= 1 + 0.01 * len(same)


@ROWS
@pytest.mark.parametrize(
    ("kind", "with_lead"),
    [*((kind, True) for kind in (*ALL, Q4_0)), (D2Q2_64, False), (D2Q3_64, False)],
    ids=lambda value: value.name if isinstance(value, TensorType) else str(value),
)
def test_error_feedback(kind: TensorType, rows: int, with_lead: bool, in_torch: Callable[[], None]) -> None:
    block = Block.make(kind, rows)
    lead = block.lead if with_lead else None
    arguments = block.search, block.weights, block.factor, lead, block.inverses()
    before = block.weights.clone()
    found = gptaq.quantize_block(*arguments)
    assert torch.equal(block.weights, before)
    in_torch()
    expected = gptaq.quantize_block(*arguments)
    assert [part.dtype for part in found] == [part.dtype for part in expected]
    assert [part.shape for part in found] == [part.shape for part in expected]
    same = (found[2] == expected[2]).all(1) & (found[0] == expected[0])
    # Zeros fit all codebooks equally well.
    near_ties(same[1:])
    books = (found[1] == expected[1])[same]
    assert float(books[2:].float().mean()) > 0.99
    size = found[0][same, None]
    for one, other in zip(found[3:], expected[3:], strict=True):
        close(one[same] / size, other[same] / size)


@ROWS
@KINDS
def test_descent(kind: TensorType, rows: int, in_torch: Callable[[], None]) -> None:
    block = Block.make(kind, rows)
    in_torch()
    quantized = gptaq.quantize_block(block.search, block.weights, block.factor, None, block.inverses())
    scales, books, codes = quantized[:3]
    rounded, wanted = (gptaq._storage_order(each, kind) / scales[:, None] for each in (quantized[3], block.weights))
    units, target = rounded.round(), wanted.clamp(-200, 200) + block.noise
    order = descent._order(block.width, units.device)
    inverses = torch.cholesky_inverse(torch.linalg.cholesky(diagonal_squares(block.hessian)))
    factors = torch.linalg.cholesky(inverses[:, order][:, :, order], upper=True)
    gradient = (units - target) @ block.hessian
    arguments = gradient, units, books.long(), codes, block.hessian, inverses, factors, corners(factors, block.width)
    before = [each.clone() for each in arguments]
    found = descent.choose_block(block.search, *arguments)
    assert all(torch.equal(*pair) for pair in zip(arguments, before, strict=True))
    expected = descent.choose_block(block.search, *arguments)
    assert [part.dtype for part in found] == [part.dtype for part in expected]
    same = (found[2] == expected[2]).all(1)
    near_ties(same)
    assert torch.equal(found[0][same], expected[0][same])
    assert float((found[1] == expected[1])[same].float().mean()) > 0.99

    def objective(values: torch.Tensor) -> float:
        return float((((values - target) @ block.hessian) * (values - target)).sum(dtype=torch.float64))

    assert objective(found[0]) == pytest.approx(objective(expected[0]), rel=1e-3)
    assert objective(found[0]) < 0.99 * objective(units)


@ROWS
@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
def test_scales_and_codebooks(kind: TensorType, rows: int, in_torch: Callable[[], None]) -> None:
    block = Block.make(kind, rows)
    search, weights = block.search, gptaq._storage_order(block.weights, kind)
    scales = triton_search.block_scales(search, search.vectors(weights).reshape(weights.shape))
    vectors = search.vectors(weights / scales[:, None])
    books, errors = triton_search.search(search, vectors)
    in_torch()
    # The kernel's table is coarser: two scales that are as good as equal may change places.
    expected = search.block_scales(weights)
    near_ties((scales == expected) | (torch.arange(rows, device=DEVICE) < 3))
    _, other = search.search(search.vectors(weights / expected[:, None]))
    lost, lost_elsewhere = (
        float((scale.square() * part.view(rows, -1).sum(1))[3:].sum())
        for scale, part in ((scales, errors), (expected, other))
    )
    assert lost == pytest.approx(lost_elsewhere, rel=1e-3)
    books_in_torch, errors_in_torch = search.search(vectors)
    # Far beyond the table, it doesn't tell codebooks apart that do differ: a few of many groups.
    off = (errors - errors_in_torch).abs() > 1e-2 + 2e-3 * errors_in_torch
    assert float(off.sum()) <= 0.01 * len(off) if CUDA else not bool(off.any())
    torch.testing.assert_close(errors, errors_in_torch, rtol=0.1, atol=1e-2)
    # Of zeros many codebooks are equally good, and of small values beside an outlier some; on GPUs of small ones alone.
    alive = vectors.square().sum((1, 2)) > 1e-6
    if CUDA:
        alive.view(rows, -1)[:3] = False
    assert float((books == books_in_torch)[alive].float().mean()) > 0.9


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
def test_scales_of_outliers(kind: TensorType, in_torch: Callable[[], None]) -> None:
    """They lie beyond the table, where the error grows with the distance."""
    search = CodebookSearch(kind, DEVICE)
    weights = torch.randn(8, kind.block_size, generator=torch.Generator().manual_seed(1))
    weights[:, 3] = torch.linspace(30, 400, 8)
    weights = weights.to(DEVICE)
    scales = triton_search.block_scales(search, search.vectors(weights).reshape(weights.shape))
    in_torch()
    near_ties(scales == search.block_scales(weights))
