"""The K encoders, decoded by gguf-py and held against a dense search in float64."""

from threading import Thread

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch

from d2q_edge.formats import k_quants
from d2q_edge.formats.k_quants import ENCODERS

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
each_type = pytest.mark.parametrize("name", ENCODERS)
RELATIVE_ERROR = {"q4_k": 6e-3, "q5_k": 1.4e-3, "q6_k": 3.2e-4}
"""Of Gaussian weights; llama-quantize's is 2 to 13 % above ours."""
STEP = {"q4_k": 1 / 15, "q5_k": 1 / 31, "q6_k": 1 / 32}
"""Distance between neighboring values, over the largest magnitude of a group whose values have both signs: at most
twice this."""


def encode(name: str, weights: F32) -> npt.NDArray[np.uint8]:
    """On the CPU, from numpy to numpy."""
    packed: npt.NDArray[np.uint8] = k_quants.encode(name, torch.from_numpy(weights)).numpy()
    return packed


def decode(name: str, packed: npt.NDArray[np.uint8]) -> F32:
    values: F32 = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[name.upper()])
    return values


def relative_error(name: str, weights: F32) -> float:
    square = np.square(decode(name, encode(name, weights)) - weights.astype(np.float64))
    return float(square.sum() / np.square(weights.astype(np.float64)).sum())


def gaussian(rows: int, columns: int, seed: int = 0) -> F32:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


@each_type
@pytest.mark.parametrize("rows", [1, 64, 257])
def test_gaussian_weights(name: str, rows: int) -> None:
    weights = gaussian(rows, 512)
    packed = encode(name, weights)
    kind = gguf.GGMLQuantizationType[name.upper()]
    assert packed.dtype == np.uint8
    assert packed.shape == (rows, 2 * gguf.GGML_QUANT_SIZES[kind][1])
    assert relative_error(name, weights) < RELATIVE_ERROR[name] * (1.15 if rows == 1 else 1)


def dense_affine(x: F64, top: int) -> float:
    """Least squared error of one group over offsets and scales on a grid, without any rounding of either."""
    low, high = min(x.min(), 0.0), x.max()
    best = np.inf
    for minimum in np.linspace(1.15 * low, 0.6 * low, 60):
        scales = np.linspace(0.7, 1.15, 120) * (high - minimum) / top
        codes = np.clip(np.rint((x - minimum) / scales[:, None]), 0, top)
        best = min(best, np.square(codes * scales[:, None] + minimum - x).sum(1).min())
    return best


def dense_symmetric(x: F64) -> float:
    scales = np.linspace(0.8, 1.2, 2000)[:, None] * -x[np.abs(x).argmax()] / 32
    codes = np.clip(np.rint(x / scales), -32, 31)
    return float(np.square(codes * scales - x).sum(1).min())


@pytest.mark.parametrize(
    ("name", "positive", "allowed"),
    [("q4_k", False, 1.07), ("q5_k", False, 1.10), ("q6_k", False, 1.07), ("q4_k", True, 1.0), ("q5_k", True, 1.05)],
)
def test_near_the_best_of_a_dense_search(name: str, positive: bool, allowed: float) -> None:
    """What is allowed on top is mainly the rounding of scales and minimums, which the dense search doesn't do.

    A minimum can't be above zero.
    """
    weights = gaussian(4, 256, seed=1)
    if positive:
        weights = 1 + np.abs(weights)
    if name == "q6_k":
        best = sum(dense_symmetric(x) for x in weights.reshape(-1, 16).astype(np.float64))
    else:
        best = sum(dense_affine(x, 2 ** int(name[1]) - 1) for x in weights.reshape(-1, 32).astype(np.float64))
    ours = np.square(decode(name, encode(name, weights)) - weights).sum()
    assert ours < allowed * best


@each_type
def test_values_that_a_block_can_hold_exactly(name: str) -> None:
    """Random valid blocks, decoded and encoded again. The codes of every group use the whole range."""
    rng = np.random.default_rng(2)
    kind = gguf.GGMLQuantizationType[name.upper()]
    packed = rng.integers(0, 256, (64, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    halves = slice(208, 210) if name == "q6_k" else slice(0, 4)
    count = (halves.stop - halves.start) // 2
    packed[:, halves] = rng.uniform(0.001, 0.1, (64, count)).astype("<f2").view(np.uint8)
    # Integer scales from half their range up: smaller ones can come out rounded differently.
    packed[:, 192 : 208 if name == "q6_k" else 192] |= 0x40
    if name == "q6_k":
        packed[:, 192:208] &= 0x7F
    else:
        packed[:, 4:8] |= 32
        packed[:, 4:8] &= 63
        packed[:, 8:12] &= 63
        packed[:, 4:8] |= 0x80
        packed[:, 8:12] |= 0x80
    weights = decode(name, packed)
    assert relative_error(name, weights) < RELATIVE_ERROR[name] / 4


def special(name: str) -> F32:
    """Rows of one block."""
    rows = {
        "zeros": np.zeros(256),
        "constant": np.full(256, 0.3),
        "negative constant": np.full(256, -0.3),
        "outlier": np.where(np.arange(256) == 77, 100, np.sin(np.arange(256))),
        "negative outlier": np.where(np.arange(256) == 77, -100, np.sin(np.arange(256))),
        "one weight": np.where(np.arange(256) == 77, 5, 0),
        "positive": 1 + np.abs(np.sin(np.arange(256))),
        "negative": -1 - np.abs(np.sin(np.arange(256))),
        "small": np.sin(np.arange(256)) * 1e-3,
        "denormal": np.sin(np.arange(256)) * 1e-40,
        "smallest": np.where(np.arange(256) == 3, 1e-45, 0),
        "huge": np.sin(np.arange(256)) * 1e6,
        "largest": np.sin(np.arange(256)) * 3e38,
        "zero groups": np.where(np.arange(256) < 128, 0, np.sin(np.arange(256))),
    }
    return rows[name].astype(np.float32)[None]


@each_type
@pytest.mark.parametrize(
    "row", ["constant", "negative constant", "one weight", "positive", "negative", "small", "zero groups"]
)
def test_odd_blocks_are_near(name: str, row: str) -> None:
    weights = special(row)
    found = decode(name, encode(name, weights))
    step = STEP[name] * np.abs(weights).max()
    # Half a step of codes, and half a step of the minimum's 6 bits.
    assert np.abs(found - weights).max() <= 0.55 * step * (1 if name == "q6_k" else 2) + np.abs(weights).max() / 100
    if row in ("one weight", "zero groups"):
        assert (found[weights == 0] == 0).all()


@each_type
@pytest.mark.parametrize("row", ["zeros", "denormal", "smallest"])
def test_nothing_becomes_nothing(name: str, row: str) -> None:
    found = decode(name, encode(name, special(row)))
    assert (found == 0).all()


@each_type
@pytest.mark.parametrize("row", ["outlier", "negative outlier"])
def test_an_outlier_does_not_erase_the_other_groups(name: str, row: str) -> None:
    weights = special(row)
    found = decode(name, encode(name, weights))
    assert abs(found[0, 77] / weights[0, 77] - 1) < 0.04
    rest = np.delete(np.arange(256), np.arange(64, 96))
    square = np.square(found - weights)[0, rest].mean() / np.square(weights[0, rest]).mean()
    assert square < {"q4_k": 0.03, "q5_k": 0.01, "q6_k": 0.01}[name]


@each_type
@pytest.mark.parametrize("row", ["huge", "largest"])
def test_weights_beyond_every_scale_stay_finite(name: str, row: str) -> None:
    found = decode(name, encode(name, special(row)))
    assert np.isfinite(found).all()
    assert np.abs(found).max() > 1e5


@each_type
def test_pieces_do_not_show(name: str) -> None:
    weights = gaussian(k_quants.PIECE // 256 + 3, 256, seed=6)
    whole = encode(name, weights)
    for start, stop in ((0, 7), (250, 259)):
        np.testing.assert_array_equal(whole[start:stop], encode(name, weights[start:stop]))


@each_type
def test_threads_do_not_show(name: str) -> None:
    """Nor does the encoder's way of using them."""
    weights = gaussian(2 * k_quants.PIECE // 512 + 3, 512, seed=8)
    expected = encode(name, weights)
    threads, elsewhere = torch.get_num_threads(), []
    try:
        torch.set_num_threads(3)
        np.testing.assert_array_equal(encode(name, weights), expected)
        other = Thread(target=lambda: elsewhere.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert [torch.get_num_threads(), *elsewhere] == [3, 3]
    finally:
        torch.set_num_threads(threads)


@each_type
@pytest.mark.parametrize("rows", [1, 3])
def test_weights_stay(name: str, rows: int) -> None:
    """Also those of one block, whose transpose is the same memory; and weights in 16 bits are worth their floats."""
    weights = torch.from_numpy(gaussian(rows, 256, seed=10)).bfloat16()
    floats = weights.float()
    assert torch.equal(k_quants.encode(name, weights), k_quants.encode(name, floats))
    assert torch.equal(floats, weights.float())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_type
def test_on_a_gpu(name: str) -> None:
    """What it decodes to is the same, but where two candidates are equally good up to rounding; in several pieces."""
    weights = torch.from_numpy(gaussian(k_quants.GPU_PIECE // 768 + 5, 768, seed=11))
    for dtype in (torch.float32, torch.bfloat16):
        rows = weights.to(dtype)
        found = k_quants.encode(name, rows.cuda())
        assert found.device.type == "cuda"
        expected = k_quants.encode(name, rows)
        decoded, values = decode(name, found.cpu().numpy()), decode(name, expected.numpy())
        assert (decoded != values).mean() < 1e-3
        assert np.abs(decoded - values).max() < 0.2 * np.abs(values).max()
        square = [np.square(rows.float().numpy() - one.astype(np.float64)).mean() for one in (decoded, values)]
        assert abs(square[0] / square[1] - 1) < 1e-5


@each_type
def test_sizes_do_not_matter(name: str) -> None:
    """Powers of two change d and nothing else, down to where float16 runs out of digits."""
    weights = gaussian(8, 512, seed=7)
    expected = decode(name, encode(name, weights))
    for factor in (2.0**-2, 2.0**6):
        np.testing.assert_array_equal(decode(name, encode(name, weights * np.float32(factor))), expected * factor)


def test_wrong_input() -> None:
    good = gaussian(2, 256)
    for shape in ((2, 128), (2, 0), (0, 256)):
        with pytest.raises(ValueError, match="positive multiple of 256 columns"):
            encode("q4_k", np.zeros(shape, np.float32))
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="weights must be finite"):
            encode("q6_k", np.where(np.eye(2, 256) > 0, np.float32(bad), good))
