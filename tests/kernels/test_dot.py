"""Dot products of the installed CPU backend, against float64 and the portable functions, and at the limits."""

import ctypes

import numpy as np
import pytest

from d2q_edge.formats.tensor_types import ALL, TensorType, dequantize
from tests.kernels.blocks import every_entry, every_scale, largest_entries, random_rows
from tests.kernels.ggml import F32, U8, Ggml

pytestmark = pytest.mark.parametrize("t", ALL, ids=lambda t: t.name)
COLUMNS = 2048


def _inputs(columns: int) -> dict[str, F32]:
    """Yield activations: Gaussian, heavy-tailed, and the largest of 8 bits in the patterns with the largest sums."""
    rng = np.random.default_rng(7)
    alternating = np.where(np.arange(columns) % 2, 1, -1)
    drawn = {
        "gaussian": rng.standard_normal(columns),
        "outliers": rng.standard_t(2, columns),
        "positive": np.ones(columns),
        "negative": -np.ones(columns),
        "alternating": alternating,
        "zero": np.zeros(columns),
    }
    return {name: values.astype(np.float32) for name, values in drawn.items()}


def _check(ggml: Ggml, t: TensorType, rows: U8, x: F32) -> None:
    activations, values = ggml.activations(t, x)
    weights = dequantize(t, rows).astype(np.float64)
    for row, w in zip(rows, weights, strict=True):
        exact = float(w @ values.astype(np.float64))
        size = float(np.abs(w) @ np.abs(values.astype(np.float64)))
        for generic in (False, True):
            assert abs(ggml.vec_dot(t, x.size, row, activations, generic) - exact) <= 2e-6 * size


@pytest.mark.parametrize("name", list(_inputs(1)))
def test_random_rows(ggml: Ggml, t: TensorType, name: str) -> None:
    _check(ggml, t, random_rows(t, 16, COLUMNS), _inputs(COLUMNS)[name])


@pytest.mark.parametrize("name", list(_inputs(1)))
def test_every_entry_of_every_codebook(ggml: Ggml, t: TensorType, name: str) -> None:
    rows = every_entry(t)
    _check(ggml, t, rows, _inputs(rows.shape[1] // t.type_size * t.block_size)[name])


@pytest.mark.parametrize("name", list(_inputs(1)))
@pytest.mark.parametrize("sign", [1, -1])
def test_largest_sums(ggml: Ggml, t: TensorType, name: str, sign: int) -> None:
    _check(ggml, t, largest_entries(t, COLUMNS, sign), _inputs(COLUMNS)[name])


def test_extreme_scales(ggml: Ggml, t: TensorType) -> None:
    rows = every_scale(t)
    x = _inputs(rows.shape[1] // t.type_size * t.block_size)["gaussian"]
    _check(ggml, t, rows, x)
    blocks = rows.reshape(-1, 1, t.type_size)
    for block in blocks:  # alone, so that the largest scale does not hide the smallest
        _check(ggml, t, block, x[: t.block_size])


@pytest.mark.parametrize("columns", [1, 2, 3, 5])
def test_rows_of_a_few_blocks(ggml: Ggml, t: TensorType, columns: int) -> None:
    n = columns * t.block_size
    _check(ggml, t, random_rows(t, 4, n, seed=n), _inputs(n)["gaussian"])


def test_against_unquantized_activations(ggml: Ggml, t: TensorType) -> None:
    """Only rounding the activations causes an error: at most half a step of each block's scale per weight."""
    rows = random_rows(t, 16, COLUMNS)
    x = _inputs(COLUMNS)["gaussian"]
    activations, _ = ggml.activations(t, x)
    block = 256 if t.block_size == 256 else 32
    step = np.repeat(np.abs(x.reshape(-1, block)).max(axis=1) / 127, block)
    for row, w in zip(rows, dequantize(t, rows).astype(np.float64), strict=True):
        bound = 0.51 * float(np.abs(w) @ step)
        assert abs(ggml.vec_dot(t, COLUMNS, row, activations) - float(w @ x.astype(np.float64))) <= bound


def test_backend_uses_the_function_of_this_type(ggml: Ggml, t: TensorType) -> None:
    name = f"ggml_vec_dot_{t.name}_{'q8_K' if t.block_size == 256 else 'q8_0'}"
    chosen = ctypes.cast(ggml.cpu_traits(t.id).vec_dot, ctypes.c_void_p).value
    assert chosen == ctypes.cast(getattr(ggml.cpu, name), ctypes.c_void_p).value
