"""The four types in the installed libggml-base: layout, dequantization, validation, reference encoder."""

import numpy as np
import pytest

from d2q_edge.formats.tensor_types import ALL, TensorType, dequantize, unpack
from tests import reference_encoder
from tests.kernels.blocks import every_entry, every_scale, random_rows
from tests.kernels.ggml import Ggml

pytestmark = pytest.mark.parametrize("t", ALL, ids=lambda t: t.name)


def test_name_and_sizes(ggml: Ggml, t: TensorType) -> None:
    traits = ggml.traits(t.id)
    assert traits.type_name == t.name.encode()
    assert (traits.blck_size, traits.type_size, traits.is_quantized) == (t.block_size, t.type_size, True)
    assert not ggml.base.ggml_quantize_requires_imatrix(t.id)


@pytest.mark.parametrize("rows", [every_entry, every_scale, lambda t: random_rows(t, 7, 1024)])
def test_dequantize_is_numpys_bit_for_bit(ggml: Ggml, t: TensorType, rows: object) -> None:
    packed = rows(t)  # type: ignore[operator]
    expected = dequantize(t, packed)
    np.testing.assert_array_equal(ggml.dequantize(t, packed).view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_validation_rejects_a_scale_that_is_not_finite(ggml: Ggml, t: TensorType, bad: float) -> None:
    packed = random_rows(t, 1, 1024)
    assert ggml.validate(t, packed)
    packed[0, -t.type_size : -t.type_size + 2] = np.array([bad], np.float16).view(np.uint8)
    assert not ggml.validate(t, packed)


def test_encoder_error_on_gaussian_weights(ggml: Ggml, t: TensorType) -> None:
    weights = np.random.default_rng(2).standard_normal((32, 1024)).astype(np.float32)
    error = np.mean((dequantize(t, ggml.quantize(t, weights)) - weights) ** 2)
    assert error <= (0.0610 if t.paired else 0.0166)


@pytest.mark.parametrize("distribution", ["gaussian", "laplace", "columns"])
def test_encoder_is_as_good_as_numpys(ggml: Ggml, t: TensorType, distribution: str) -> None:
    rng = np.random.default_rng(3)
    drawn = rng.standard_normal((8, 1024)) if distribution != "laplace" else rng.laplace(size=(8, 1024))
    if distribution == "columns":
        drawn *= rng.lognormal(0, 1, 1024)
    weights = drawn.astype(np.float32)
    ours = np.mean((dequantize(t, ggml.quantize(t, weights)) - weights) ** 2)
    reference = np.mean((dequantize(t, reference_encoder.encode(t, weights)) - weights) ** 2)
    assert ours <= 1.02 * reference


def test_encoder_heeds_importance(ggml: Ggml, t: TensorType) -> None:
    rng = np.random.default_rng(4)
    weights = rng.standard_normal((16, 512)).astype(np.float32)
    importance = rng.lognormal(0, 1.5, 512).astype(np.float32)
    plain = (dequantize(t, ggml.quantize(t, weights)) - weights) ** 2
    weighted = (dequantize(t, ggml.quantize(t, weights, importance)) - weights) ** 2
    assert np.mean(weighted * importance) < 0.93 * np.mean(plain * importance)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-7, 1e6, 1e30])
def test_encoder_output_is_finite(ggml: Ggml, t: TensorType, scale: float) -> None:
    weights = (np.random.default_rng(5).standard_normal((2, 512)) * scale).astype(np.float32)
    weights[1, 300] *= 1000
    packed = ggml.quantize(t, weights)
    assert ggml.validate(t, packed)
    if scale in (0.0, 1e-30):
        assert not unpack(t, packed)[0][0].any()


def test_encoder_survives_weights_that_are_not_finite(ggml: Ggml, t: TensorType) -> None:
    weights = np.ones((1, 512), np.float32)
    weights[0, 3], weights[0, 290] = np.nan, np.inf
    assert ggml.validate(t, ggml.quantize(t, weights))
