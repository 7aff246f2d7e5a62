"""The C kernels against definitions in float64 and against torch, on ordinary and on adversarial groups."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from d2q_edge.formats.codebooks import PAIR_TABLE, SCALAR_TABLE
from d2q_edge.formats.tensor_types import ALL, D2Q2, D2Q2_64, D2Q3, D2Q3_64, TensorType, table_index
from d2q_edge.quantize import descent, gptaq, native
from d2q_edge.quantize.codebook_search import CodebookSearch, bin_centers
from d2q_edge.quantize.descent import group_factors
from d2q_edge.quantize.feedback import diagonal_blocks, invert_code_blocks
from d2q_edge.quantize.native import library as library_module
from d2q_edge.quantize.native import tables, threads
from tests.quantize.block_of_columns import Block
from tests.quantize.slow_feedback import F64, slow_group
from tests.quantize.slow_trellis import nearest_errors, nearest_path

KINDS = pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
TWO = pytest.mark.parametrize("kind", [D2Q2, D2Q3], ids=lambda kind: kind.name)
SEARCHES = {kind: CodebookSearch(kind) for kind in ALL}


def groups(kind: TensorType) -> torch.Tensor:
    """Values in units of d, [groups, 32 / V, V]: ordinary ones, then those that are hard for bins and sums."""
    generator = torch.Generator().manual_seed(5)
    normal = torch.randn(40, 32, generator=generator) * torch.linspace(1, 60, 40)[:, None]
    outlier = normal[:8].clone()
    outlier[:, 3] = torch.linspace(50, 5000, 8)
    extreme = torch.stack([
        torch.zeros(32), torch.full((32,), 1e-30), torch.full((32,), 63.0), torch.full((32,), -64.0),
        torch.full((32,), 1e4), torch.full((32,), 1e9) * torch.randn(32, generator=generator).sign(),
        torch.arange(32.0) * 8 - 128, torch.tensor([90.0, -90.0] * 16),
    ])  # fmt: skip
    return SEARCHES[kind].vectors(torch.cat([normal, outlier, extreme])).contiguous()


def slow_errors(kind: TensorType, values: torch.Tensor) -> F64:
    """Squared errors of a group [32 / V, V] in all codebooks."""
    if kind.windowed:
        return nearest_errors(values[:, 0].double().numpy(), SCALAR_TABLE.astype(np.float64))
    off = values.double().numpy()[None, :, None] - PAIR_TABLE.astype(np.float64)[:, None]
    errors: F64 = np.square(off).sum(3).min(2).sum(1)
    return errors


@TWO
def test_codebooks_are_the_best(kind: TensorType) -> None:
    """Of all 256, by their exact errors; where it's only nearly the best one, it is nearly as good."""
    vectors = groups(kind)
    codebooks, errors = native.search(SEARCHES[kind], vectors)
    assert codebooks.dtype == torch.int64
    same = 0
    for values, codebook, error in zip(vectors, codebooks.tolist(), errors.tolist(), strict=True):
        expected = slow_errors(kind, values)
        assert error == pytest.approx(expected[codebook], rel=1e-5, abs=1e-5)
        assert error <= expected.min() * 1.003 + 1e-5
        same += error <= expected.min() * (1 + 1e-5) + 1e-5
    assert same >= len(vectors) - 1


@TWO
def test_exhaustive_search_measures_all(kind: TensorType) -> None:
    vectors = groups(kind)
    _, errors = native.search(CodebookSearch(kind, exhaustive=True), vectors)
    expected = [slow_errors(kind, values).min() for values in vectors]
    np.testing.assert_allclose(errors.numpy(), expected, rtol=1e-5, atol=1e-5)


@TWO
def test_codes_are_the_nearest(kind: TensorType) -> None:
    vectors = groups(kind)[:-3]
    chosen = torch.arange(len(vectors)) * 4 % 256
    codes = native.nearest_codes(SEARCHES[kind], vectors, chosen)
    assert codes.dtype == torch.uint8
    for values, codebook, found in zip(vectors.double().numpy(), chosen.tolist(), codes.tolist(), strict=True):
        if kind.windowed:
            table = SCALAR_TABLE[codebook].astype(np.float64)
            assert found == [code for chain in values.reshape(2, 16) for code in nearest_path(chain, table)[0]]
        else:
            off = values[:, None] - PAIR_TABLE[codebook].astype(np.float64)
            assert found == np.square(off).sum(2).argmin(1).tolist()


def test_what_is_no_whole_group() -> None:
    """The kernels refuse it; single pairs are found in torch."""
    search, pairs = SEARCHES[D2Q2], groups(D2Q2)[:5]
    chosen = torch.arange(5)
    expected, codes = search.nearest(pairs, chosen)
    some, found = search.nearest(pairs[:, 3:4].contiguous(), chosen)
    assert torch.equal(some, expected[:, 3:4])
    assert torch.equal(found, codes[:, 3:4])
    for wrong in (pairs[:, 3:4], pairs.double()):
        with pytest.raises(ValueError, match="32 float32 weights"):
            native.nearest_codes(search, wrong, chosen)
        with pytest.raises(ValueError, match="32 float32 weights"):
            native.search(search, wrong)


def test_ranks_of_ways() -> None:
    """The least squared error from each state to each, in quarters, at the middle of a bin."""
    ranks, centers = tables.path_ranks(SEARCHES[D2Q3]), bin_centers(tables.PATH_BINS, "cpu")
    assert ranks.shape == (tables.PATH_BINS, 8, 2, 2, 32)
    for place, state, after, codebook in ((0, 0, 0, 0), (77, 1, 0, 255), (128, 0, 1, 40), (255, 1, 1, 100)):
        entries = SCALAR_TABLE[codebook, 8 * state + after : 8 * state + 8 : 2].astype(np.float64)
        expected = np.square(entries - float(centers[place])).min() * 4
        assert abs(int(ranks[place, codebook // 32, state, after, codebook % 32]) - expected) <= 0.51


@KINDS
def test_scales_of_all_sizes(kind: TensorType) -> None:
    """A block times a power of two has that scale times the power, where float16 has it without rounding anew."""
    search = SEARCHES[kind]
    block = torch.randn(1, kind.block_size, generator=torch.Generator().manual_seed(2))
    (scale,) = native.block_scales(search, block)
    powers = torch.tensor([2.0**n for n in range(-8, 12)])
    assert torch.equal(native.block_scales(search, block * powers[:, None]), scale * powers)
    sizes = torch.cat([torch.zeros(1), 10.0 ** torch.arange(-38, 38, 2)])
    scales = native.block_scales(search, block * sizes[:, None])
    assert bool((scales > 0).all()) and torch.equal(scales.half().float(), scales)
    assert float(scales[0]) == float(scales[1]) == 2.0**-24
    assert float(scales[-1]) == 65504


def test_scales_as_in_torch(in_torch: None) -> None:
    """Of pairs, whose search for scales is the same, but for ties in coarser ranks."""
    search = SEARCHES[D2Q2]
    weights = torch.randn(200, 256, generator=torch.Generator().manual_seed(3))
    weights[:20, 7] = torch.linspace(1, 300, 20)
    found = native.block_scales(search, search.vectors(weights).reshape(weights.shape))
    expected = search.block_scales(weights)
    assert float((found == expected).float().mean()) > 0.97


def quantize(kind: TensorType, rows: int, *, with_P: bool = True) -> tuple[Block, tuple[torch.Tensor, ...]]:
    block, search = Block.make(kind, rows), SEARCHES[kind]
    inv_U_jj = invert_code_blocks(diagonal_blocks(block.U), search.levels.shape[2])
    return block, native.quantize_block(search, block.weights, block.U, block.P if with_P else None, inv_U_jj)


@pytest.mark.parametrize("with_P", [True, False])
@KINDS
def test_quantize_block(kind: TensorType, with_P: bool) -> None:
    """Every step from its definition, given what the kernel has done before."""
    rows = 11
    block, (scales, codebooks, codes, quantized, errors, work) = quantize(kind, rows, with_P=with_P)
    search, width = SEARCHES[kind], SEARCHES[kind].levels.shape[2]
    weights, u = block.weights.double().numpy(), block.U.double().numpy()
    p = block.P.double().numpy() if with_P else np.zeros_like(u)
    assert torch.equal(block.weights, Block.make(kind, rows).weights), "the weights stay as they are"
    assert torch.equal(scales, native.block_scales(search, block.weights))
    agreed, losses = [], []
    for row in range(rows):
        own = work[row].double().numpy(), errors[row].double().numpy()
        for group in range(kind.groups):
            here, before = slice(group * 32, group * 32 + 32), slice(group * 32)
            start = weights[row, here] + own[0][before] @ p[before, here] - own[1][before] @ u[before, here]
            scale, codebook = float(scales[row]), int(codebooks[row, group])
            nearest = int(slow_errors(kind, torch.from_numpy(start / scale).view(-1, width)).argmin())
            (expected, *arrays), (_, _, other, _) = (
                slow_group(start, search.levels[each].double().numpy() * scale, *factors, width, windowed=kind.windowed)
                for factors in [(u[here, here], p[here, here])]
                for each in (codebook, nearest)
            )
            losses.append((np.square(own[1][here]).sum() + 1e-12) / (np.square(other).sum() + 1e-12))
            per_group = 32 // width
            agreed.append(codes[row, group * per_group : (group + 1) * per_group].tolist() == expected)
            if agreed[-1]:
                for array, tensor in zip(arrays, (quantized, errors, work), strict=True):
                    size = scale * (1 + np.abs(start / scale).max())
                    np.testing.assert_allclose(tensor[row, here].numpy() / size, array / size, rtol=1e-4, atol=1e-5)
    # The codebook has no greater loss than the nearest one, and mostly a smaller one.
    assert max(losses) < 1.01 and np.mean(losses) < 0.98
    # A near tie of codes is decided otherwise now and then.
    assert np.mean(agreed) > 0.97
    index = table_index(codes) if kind.windowed else codes
    entries = search.levels[codebooks.long().repeat_interleave(32 // width, 1), index.long()].flatten(1)
    assert torch.equal(entries * scales[:, None], quantized)


@KINDS
def test_choose_block(kind: TensorType, in_torch: None) -> None:
    """It is better than torch's, which tries fewer codebooks; test_descent.py has the choices from their definition."""
    rows = 61
    block, (scales, codebooks, codes, rounded, *_) = quantize(kind, rows)
    width = SEARCHES[kind].levels.shape[2]
    units, wanted = (gptaq.storage_order(each, kind) / scales[:, None] for each in (rounded, block.weights))
    units, target = units.round(), wanted.clamp(-200, 200) + block.noise
    gradient, factors = (units - target) @ block.hessian, group_factors(block.hessian, width)
    state = gradient, units, codebooks.long(), codes, block.hessian
    before = [each.clone() for each in state]
    found = native.choose_block(SEARCHES[kind], *state, *factors)
    assert all(torch.equal(*pair) for pair in zip(state, before, strict=True))
    expected = descent.choose_block(SEARCHES[kind], *state, factors)
    assert [part.dtype for part in found] == [part.dtype for part in expected]
    assert [part.shape for part in found] == [part.shape for part in expected]

    def objective(values: torch.Tensor) -> torch.Tensor:
        off = (values - target).double()
        return ((off @ block.hessian.double()) * off).sum(1)

    assert bool((objective(found[0]) <= objective(units) * (1 + 1e-5) + 1e-3).all())
    assert float(objective(found[0]).sum()) < float(objective(expected[0]).sum())
    index = table_index(found[2]) if kind.windowed else found[2]
    entries = SEARCHES[kind].levels[found[1].repeat_interleave(32 // width, 1), index.long()]
    assert torch.equal(gptaq.storage_order(entries.flatten(1), kind), found[0])


def everything(kind: TensorType, rows: int) -> list[torch.Tensor]:
    """What all kernels return."""
    search = SEARCHES[kind]
    block, found = quantize(kind, rows)
    units = gptaq.storage_order((found[3] / found[0][:, None]).round(), kind)
    state = block.noise @ block.hessian, units, found[1].to(torch.int64), found[2], block.hessian
    vectors = search.vectors(block.noise * 20)
    codebooks, errors = native.search(search, vectors)
    return [
        *found,
        *native.choose_block(search, *state, *group_factors(block.hessian, search.levels.shape[2])),
        codebooks,
        errors,
        native.nearest_codes(search, vectors, codebooks),
        native.block_scales(search, block.noise),
    ]


@pytest.fixture
def with_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [5, 9, 77])
@KINDS
def test_threads_change_nothing(kind: TensorType, rows: int, with_threads: Callable[[int], None]) -> None:
    results = []
    for count in (1, 2, 5):
        with_threads(count)
        results.append(everything(kind, rows))
    for one, other in zip(results[0] * 2, results[1] + results[2], strict=True):
        assert torch.equal(one, other)


def test_parts_of_the_rows(monkeypatch: pytest.MonkeyPatch, with_threads: Callable[[int], None]) -> None:
    """Every row is done once, whatever the number of threads."""
    done: list[tuple[int, int]] = []

    class Library:
        def d2q_note(self, _tables: object, begin: object, end: object, *_tensors: object) -> None:
            done.append((begin.value, end.value))  # type: ignore[attr-defined]

    monkeypatch.setattr(threads, "library", Library)
    for count in (1, 3):
        with_threads(count)
        for rows in (0, 1, 8, 9, 100, 1000):
            done.clear()
            threads.run("note", SEARCHES[D2Q2].native_tables, rows)
            assert [row for begin, end in sorted(done) for row in range(begin, end)] == list(range(rows))


def test_an_error_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch, with_threads: Callable[[int], None]) -> None:
    class Library:
        def d2q_fail(self, *_: object) -> None:
            raise RuntimeError("as expected")

    monkeypatch.setattr(threads, "library", Library)
    with_threads(2)
    with pytest.raises(RuntimeError, match="as expected"):
        threads.run("fail", SEARCHES[D2Q2].native_tables, 100)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [D2Q2_64, D2Q3_64], ids=lambda kind: kind.name)
def test_without_instructions_for_vectors(kind: TensorType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The C code for other CPUs: the same results, but for the last bits and near ties."""
    expected = everything(kind, 40)
    plain = [flag for flag in library_module.FLAGS if flag != library_module.NATIVE]
    monkeypatch.setattr(library_module, "FLAGS", tuple(plain))
    other = library_module.load(tmp_path)
    monkeypatch.setattr(threads, "library", lambda: other)
    for one, found in zip(expected, everything(kind, 40), strict=True):
        same = torch.isclose(one[4:].double(), found[4:].double(), rtol=1e-3, atol=1e-4).view(len(one) - 4, -1).all(1)
        assert float(same.float().mean()) > 0.85
