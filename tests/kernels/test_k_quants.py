"""Our K-quant encoders against llama.cpp's, decoded by ggml."""

import gguf
import numpy as np
import pytest
import torch

from d2q_edge.formats.k_quants import ENCODERS, encode
from d2q_edge.formats.tensor_types import TensorType
from d2q_edge.model.checkpoint import Checkpoint
from tests.checkpoints import EXAMPLE
from tests.kernels.ggml import F32, Ggml


def stock_type(name: str) -> TensorType:
    kind = gguf.GGMLQuantizationType[name.upper()]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return TensorType(name, int(kind), block, size, paired=False)


def error(ggml: Ggml, t: TensorType, weights: F32, packed: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> float:
    return float(np.square(ggml.dequantize(t, packed).astype(np.float64) - weights).sum())


@pytest.mark.parametrize("name", ENCODERS)
def test_better_than_llama_quantize(ggml: Ggml, name: str) -> None:
    """On the example's embeddings, two tokens per row, without an imatrix."""
    weights = Checkpoint.open(EXAMPLE).tensor("model.embed_tokens.weight").float().numpy()[:2048].reshape(1024, -1)
    t = stock_type(name)
    ours, stock = encode(name, torch.from_numpy(weights)).numpy(), ggml.quantize(t, weights)
    assert ggml.validate(t, ours)
    assert error(ggml, t, weights, ours) < 0.98 * error(ggml, t, weights, stock)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("scale", [1e-42, 1e-7, 1.0, 1e30])
def test_ggml_and_gguf_decode_the_same(ggml: Ggml, name: str, scale: float) -> None:
    weights = (np.random.default_rng(0).standard_normal((4, 512)) * scale).astype(np.float32)
    weights[1, 5] *= 100
    weights[2] = 0
    weights[3] = np.abs(weights[3])
    t = stock_type(name)
    packed = encode(name, torch.from_numpy(weights)).numpy()
    assert ggml.validate(t, packed)
    by_gguf = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[name.upper()])
    # They may differ by one fused multiply-add.
    np.testing.assert_allclose(ggml.dequantize(t, packed), by_gguf, rtol=1e-6, atol=1e-6 * np.abs(by_gguf).max())
