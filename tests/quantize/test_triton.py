"""The Triton kernels against the same steps in torch on the CPU: on a GPU, or else in Triton's interpreter.

tests/__init__.py turns the interpreter on. Without Triton the tests fail where the dev extra installs it.
"""

import platform
import sys
from importlib.util import find_spec

import pytest
import torch

from d2q_edge.formats.tensor_types import ALL, D2Q2_64, D2Q3_64, Q4_0, TensorType
from d2q_edge.quantize import descent, gptaq, triton
from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.descent import group_factors
from d2q_edge.quantize.feedback import diagonal_blocks, invert_code_blocks
from tests.quantize.block_of_columns import Block

EXPECTED = sys.platform == "linux" and platform.machine() == "x86_64"
pytestmark = [
    pytest.mark.skipif(
        find_spec("triton") is None and not EXPECTED, reason="the dev extra has Triton on Linux on x86-64 only"
    ),
    pytest.mark.slow,
    pytest.mark.usefixtures("in_torch"),
]
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
KINDS = pytest.mark.parametrize("kind", (*ALL, Q4_0), ids=lambda kind: kind.name)
ROWS = pytest.mark.parametrize("rows", [7, 1000, 20001] if CUDA else [7])
"""The interpreter is slow."""


def programs(kind: TensorType, rows: int) -> int:
    """Rows for a kind: enough for a program of 16 rows, and another one, for one of the kinds in the interpreter."""
    return 25 if not CUDA and kind == D2Q2_64 else rows


def searches(kind: TensorType) -> tuple[CodebookSearch, CodebookSearch]:
    """Of the kernels, which measure all codebooks of windowed types, and of torch, which is made to."""
    return CodebookSearch(kind, DEVICE, exhaustive=True), CodebookSearch(kind, exhaustive=True)


def in_triton(search: CodebookSearch, weights: torch.Tensor) -> torch.Tensor:
    """Choose block scales by the kernels; without a GPU the class wouldn't use them by itself."""
    if CUDA:
        return search.block_scales(weights.to(DEVICE)).cpu()
    vectors = search.vectors(weights)
    scales = triton.block_scales(search, vectors.reshape(weights.shape))
    return search._correct_scales(vectors, scales) if search.tensor_type.windowed else scales


def near_ties(same: torch.Tensor) -> None:
    """A few of many rows may differ."""
    assert float((~same).sum()) <= 1 + 0.01 * len(same)


def test_the_kernels_are_there_where_they_are_expected() -> None:
    assert triton.is_available(torch.device("cuda")) == (find_spec("triton") is not None)
    assert not triton.is_available(torch.device("cpu"))
    for name in triton.__all__:
        assert callable(getattr(triton, name))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = triton.nonsense


@ROWS
@pytest.mark.parametrize(
    ("kind", "with_P"),
    [*((kind, True) for kind in (*ALL, Q4_0)), (D2Q2_64, False), (D2Q3_64, False)],
    ids=lambda value: value.name if isinstance(value, TensorType) else str(value),
)
def test_quantize_block(kind: TensorType, rows: int, with_P: bool) -> None:
    search, in_torch = searches(kind)
    block = Block.make(kind, programs(kind, rows))
    inv_U_jj = invert_code_blocks(diagonal_blocks(block.U), search.levels.shape[2])
    here = block.to(DEVICE)
    before = here.weights.clone()
    found = triton.quantize_block(search, here.weights, here.U, here.P if with_P else None, inv_U_jj.to(DEVICE))
    assert torch.equal(here.weights, before)
    found = tuple(part.cpu() for part in found)
    expected = gptaq.quantize_block(in_torch, block.weights, block.U, block.P if with_P else None, inv_U_jj)
    assert [part.dtype for part in found] == [part.dtype for part in expected]
    assert [part.shape for part in found] == [part.shape for part in expected]
    same = (found[2] == expected[2]).all(1) & (found[0] == expected[0])
    # Zeros fit all codebooks equally well.
    near_ties(same[1:])
    codebooks = (found[1] == expected[1])[same]
    assert float(codebooks[2:].float().mean()) > 0.99
    size = found[0][same, None]
    for one, other in zip(found[3:], expected[3:], strict=True):
        torch.testing.assert_close(one[same] / size, other[same] / size, rtol=1e-4, atol=1e-3)


@ROWS
@KINDS
def test_choose_block(kind: TensorType, rows: int) -> None:
    search, in_torch = searches(kind)
    block = Block.make(kind, programs(kind, rows))
    width = search.levels.shape[2]
    inv_U_jj = invert_code_blocks(diagonal_blocks(block.U), width)
    scales, codebooks, codes, rounded, _, _ = gptaq.quantize_block(in_torch, block.weights, block.U, None, inv_U_jj)
    units, wanted = (gptaq.storage_order(each, kind) / scales[:, None] for each in (rounded, block.weights))
    units, target = units.round(), wanted.clamp(-200, 200) + block.noise
    state = (units - target) @ block.hessian, units, codebooks.long(), codes, block.hessian
    factors = group_factors(block.hessian, width)
    arguments = [each.to(DEVICE) for each in (*state, *factors)]
    before = [each.clone() for each in arguments]
    found = tuple(part.cpu() for part in triton.choose_block(search, *arguments))
    assert all(torch.equal(*pair) for pair in zip(arguments, before, strict=True))
    expected = descent.choose_block(in_torch, *state, factors)
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
def test_scales_and_codebooks(kind: TensorType, rows: int) -> None:
    search, in_torch = searches(kind)
    weights = gptaq.storage_order(Block.make(kind, rows).weights, kind)
    scales = in_triton(search, weights)
    vectors = search.vectors(weights / scales[:, None])
    codebooks, errors = (part.cpu() for part in triton.search(search, vectors.to(DEVICE)))
    # The kernel's table is coarser: two scales that are as good as equal may change places.
    expected = in_torch.block_scales(weights)
    near_ties((scales == expected) | (torch.arange(rows) < 3))
    _, other = in_torch.search(search.vectors(weights / expected[:, None]))
    lost, lost_in_torch = (
        float((scale.square() * part.view(rows, -1).sum(1))[3:].sum())
        for scale, part in ((scales, errors), (expected, other))
    )
    assert lost == pytest.approx(lost_in_torch, rel=1e-3)
    codebooks_in_torch, errors_in_torch = in_torch.search(vectors)
    # Far beyond the table, it doesn't tell codebooks apart that do differ: a few of many groups.
    off = (errors - errors_in_torch).abs() > 1e-2 + 2e-3 * errors_in_torch
    assert float(off.sum()) <= 0.01 * len(off) if CUDA else not bool(off.any())
    torch.testing.assert_close(errors, errors_in_torch, rtol=0.1, atol=1e-2)
    # Of zeros many codebooks are equally good, and of small values beside an outlier some; on GPUs of small ones alone,
    # and of huge ones where errors are sums of a path's.
    alive = vectors.square().sum((1, 2)) > 1e-6
    if CUDA or kind.windowed:
        alive.view(rows, -1)[:3] = False
    assert float((codebooks == codebooks_in_torch)[alive].float().mean()) > 0.9


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
def test_scales_of_outliers(kind: TensorType) -> None:
    """They lie beyond the table, where the error grows with the distance."""
    search, in_torch = searches(kind)
    weights = torch.randn(8, kind.block_size, generator=torch.Generator().manual_seed(1))
    weights[:, 3] = torch.linspace(30, 400, 8)
    scales = in_triton(search, weights)
    near_ties(scales == in_torch.block_scales(weights))


@ROWS
@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
def test_nearest_entries(kind: TensorType, rows: int) -> None:
    """Points around the entries, one of them far outside."""
    search, in_torch = searches(kind)
    generator = torch.Generator().manual_seed(rows)
    values = 20 * torch.randn(rows, 2 * kind.block_size, generator=generator)
    values[0, 0] = 1e6
    codebooks = torch.randint(0, 256, (rows, values.shape[1] // 32), generator=generator).byte()
    units, codes = (part.cpu() for part in triton.nearest_entries(search, values.to(DEVICE), codebooks.to(DEVICE)))
    entries, expected = in_torch.nearest(in_torch.vectors(values), codebooks.reshape(-1).long())
    near_ties((codes == expected.view(codes.shape)).all(1))
    assert units.dtype == torch.int8
    assert codes.dtype == torch.uint8
    same = (codes == expected.view(codes.shape)).all(1)
    wanted = entries.transpose(1, 2).reshape(values.shape)
    assert torch.equal(units[same].float(), wanted[same])
