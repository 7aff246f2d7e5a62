"""Tunable layers and norms: their outputs, their gradients against float64 differences, and the way back to blocks."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from d2q_edge.formats.codebooks import PAIR_TABLE, SCALAR_TABLE
from d2q_edge.formats.tensor_types import ALL, D2Q2, D2Q2_64, D2Q3_64, Q4_0, SCALE_MAX, TensorType, dequantize
from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.quantized_layer import QuantizedLayer
from d2q_edge.quantize.rtn import round_layer
from d2q_edge.quantize.tunable import TunableLinear, TunableNorm
from tests.quantize.slow_trellis import nearest_path

KINDS = pytest.mark.parametrize("kind", (*ALL, Q4_0), ids=lambda kind: kind.name)
SEARCHES = {kind: CodebookSearch(kind) for kind in (*ALL, Q4_0)}
ROWS = 5


def quantized(kind: TensorType) -> QuantizedLayer:
    generator = torch.Generator().manual_seed(kind.id)
    return round_layer(torch.randn(ROWS, 2 * kind.block_size, generator=generator) * 0.05, SEARCHES[kind])


def tunable_layer(
    kind: TensorType, *, bias: bool = False, chunk: int = 1 << 18, dtype: torch.dtype = torch.float32
) -> TunableLinear:
    values = torch.linspace(-1, 1, ROWS) if bias else None
    return TunableLinear(quantized(kind), SEARCHES[kind], values, dtype, chunk=chunk)


def moved(layer: TunableLinear, distance: float = 3) -> TunableLinear:
    """Move the latent points."""
    layer.latent += distance * torch.randn(layer.latent.shape, generator=torch.Generator().manual_seed(2))
    layer.refresh()
    return layer


def inputs(kind: TensorType) -> torch.Tensor:
    return torch.randn(3, 4, 2 * kind.block_size, generator=torch.Generator().manual_seed(1))


def nearest_by_trying(
    kind: TensorType, values: np.ndarray[Any, Any], codebooks: np.ndarray[Any, Any]
) -> tuple[Any, Any]:
    """Entries [rows, cols] and codes [rows, codes] nearest to values in units of d, one code at a time."""
    units, codes = np.zeros_like(values), []
    for row in range(len(values)):
        for group in range(values.shape[1] // 32):
            codebook = int(codebooks[row, group])
            if kind.windowed:
                for first in (32 * group, 32 * group + 16):
                    chain, entries = nearest_path(values[row, first : first + 16], SCALAR_TABLE[codebook].astype(float))
                    units[row, first : first + 16] = entries
                    codes += chain
                continue
            for index in range(16 if kind.paired else 32):
                columns = [32 * group + index, 32 * group + 16 + index] if kind.paired else [32 * group + index]
                table = PAIR_TABLE[codebook] if kind.paired else np.arange(16.0)[:, None] - 8 + codebook
                distances = [math.dist(values[row, columns], entry) for entry in table.tolist()]
                code = int(np.argmin(distances))
                units[row, columns] = table[code]
                codes.append(code)
    return units, np.array(codes).reshape(len(values), -1)


class TestForward:
    @pytest.mark.parametrize("bias", [False, True])
    @KINDS
    def test_is_the_dequantized_matrix(self, kind: TensorType, bias: bool) -> None:
        layer, x = tunable_layer(kind, bias=bias), inputs(kind)
        weights = torch.from_numpy(dequantize(kind, quantized(kind).pack(kind))).double()
        expected = x.double() @ weights.T + (torch.linspace(-1, 1, ROWS).double() if bias else 0)
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
        assert layer(x).shape == (3, 4, ROWS)
        layer.refresh()
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)

    @KINDS
    def test_in_bfloat16(self, kind: TensorType) -> None:
        """As a GPU computes: of float32 inputs, with a bias."""
        layer, x = tunable_layer(kind, bias=True, dtype=torch.bfloat16), inputs(kind)
        weights = torch.from_numpy(dequantize(kind, quantized(kind).pack(kind))).double()
        expected = x.double() @ weights.T + torch.linspace(-1, 1, ROWS).double()
        assert layer(x).dtype == torch.bfloat16
        torch.testing.assert_close(layer(x).double(), expected, rtol=2e-2, atol=2e-2)

    @pytest.mark.parametrize("chunk", [1, 50, 1 << 18])
    @pytest.mark.parametrize("distance", [0.5, 3, 40])
    @KINDS
    def test_uses_the_nearest_entries(self, kind: TensorType, distance: float, chunk: int) -> None:
        """Also of points that moved little, or came back, most of which aren't looked up again."""
        layer, x = moved(moved(tunable_layer(kind, chunk=chunk), distance), 0.2), inputs(kind)
        units, _ = nearest_by_trying(kind, layer.latent.double().numpy(), layer.codebooks.numpy())
        scales = layer.log_scales.double().exp().numpy().repeat(kind.block_size, 1)
        expected = x.double() @ torch.from_numpy(units * scales).T
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
        first = quantized(kind).weights.double().numpy() / scales
        assert distance < 1 or (units != first.round()).mean() > 0.05

    def test_what_can_be_tuned(self) -> None:
        layer = tunable_layer(D2Q2, bias=True)
        assert layer.tuned().keys() == {"latent", "log_scales"}
        assert [name for name, _ in layer.named_parameters()] == ["weights"]


def gradients(layer: TunableLinear, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a loss that isn't linear."""
    layer(x).sin().sum().backward()
    return dict(layer.gradients())


class TestGradients:
    @KINDS
    def test_of_the_scales(self, kind: TensorType) -> None:
        """Against differences in float64."""
        layer, x = moved(tunable_layer(kind, bias=True)), inputs(kind)
        found = gradients(layer, x)["log_scales"]
        logs = layer.log_scales.double()
        units = layer.weights.detach().double() / logs.exp().repeat_interleave(kind.block_size, 1)

        def loss(logs: torch.Tensor) -> float:
            weights = units * logs.exp().repeat_interleave(kind.block_size, 1)
            return float((x.double() @ weights.T + torch.linspace(-1, 1, ROWS)).sin().sum())

        for row, block in np.ndindex(ROWS, 2):
            step = torch.zeros_like(logs)
            step[row, block] = 1e-5
            expected = (loss(logs + step) - loss(logs - step)) / 2e-5
            assert float(found[row, block]) == pytest.approx(expected, rel=1e-3, abs=1e-4)

    @KINDS
    def test_straight_through(self, kind: TensorType) -> None:
        """The gradient of a latent point is d times that of the weight that its entry makes."""
        layer, x = moved(tunable_layer(kind), 0.3), inputs(kind)
        found = gradients(layer, x)["latent"]
        weights = layer.layer().weights.double().requires_grad_()
        # As it is before scales are rounded to float16.
        (x.double() @ weights.T).sin().sum().backward()
        assert weights.grad is not None
        scales = layer.log_scales.exp().repeat_interleave(kind.block_size, 1)
        torch.testing.assert_close(found.double(), weights.grad * scales.double(), rtol=1e-3, atol=1e-5)


class TestLayer:
    @KINDS
    def test_without_steps_it_is_what_it_was(self, kind: TensorType) -> None:
        expected, found = quantized(kind), tunable_layer(kind).layer()
        np.testing.assert_array_equal(found.pack(kind), expected.pack(kind))
        assert torch.equal(found.weights, expected.weights)

    @pytest.mark.parametrize("chunk", [1, 50, 1 << 18])
    @KINDS
    def test_codes_are_the_nearest(self, kind: TensorType, chunk: int) -> None:
        layer = moved(tunable_layer(kind, chunk=chunk))
        found = layer.layer()
        _, codes = nearest_by_trying(kind, layer.latent.double().numpy(), layer.codebooks.numpy())
        np.testing.assert_array_equal(found.codes.numpy(), codes)
        assert torch.equal(found.codebooks, quantized(kind).codebooks)
        assert torch.equal(found.scales, quantized(kind).scales)
        np.testing.assert_array_equal(dequantize(kind, found.pack(kind)), found.weights.numpy())

    @pytest.mark.parametrize("kind", [D2Q2_64, D2Q3_64, Q4_0], ids=lambda kind: kind.name)
    def test_scales_are_stored_ones(self, kind: TensorType) -> None:
        layer = tunable_layer(kind)
        layer.log_scales += 0.1
        layer.log_scales[0, 0], layer.log_scales[1, 1] = -80, 80
        found, before = layer.layer(), quantized(kind)
        assert float(found.scales[0, 0]) == 2**-24
        assert float(found.scales[1, 1]) == SCALE_MAX
        expected = before.scales[2:].double() * math.exp(0.1)
        torch.testing.assert_close(found.scales[2:].double(), expected, rtol=2**-10, atol=0)
        np.testing.assert_array_equal(dequantize(kind, found.pack(kind)), found.weights.numpy())
        assert torch.equal(found.codes, before.codes)

    @KINDS
    def test_goes_back_to_what_was_kept(self, kind: TensorType) -> None:
        layer, x = moved(tunable_layer(kind)), inputs(kind)
        layer.log_scales += 0.1
        layer.refresh()
        expected, output, kept = layer.layer(), layer(x), layer.kept()
        moved(layer, 40)
        layer.log_scales -= 0.3
        layer.refresh()
        assert not torch.equal(layer.layer().codes, expected.codes)
        layer.restore(kept)
        assert torch.equal(layer(x), output)
        np.testing.assert_array_equal(layer.layer().pack(kind), expected.pack(kind))
        assert kept["latent"].dtype == torch.int8


class TestNorm:
    def norm(self) -> nn.RMSNorm:
        norm = nn.RMSNorm(3, eps=0)
        norm.weight = nn.Parameter(torch.tensor([2.0, -4.0, 0.5]))
        return norm

    def test_by_hand(self) -> None:
        bias = torch.tensor([1.0, 2.0, 3.0])
        tuned = TunableNorm(self.norm(), bias, biased=True)
        x = torch.tensor([[1.0, -1.0, 1.0]])  # of RMS one
        torch.testing.assert_close(tuned(x), torch.tensor([[3.0, 6.0, 3.5]]))
        tuned.gain.data = torch.tensor([1.5, 1.0, 2.0])
        assert tuned.shift is not None
        tuned.shift.data = torch.tensor([0.25, 0.5, -1.0])
        # Weight times gain, plus bias plus shift times |weight|.
        torch.testing.assert_close(tuned(x), torch.tensor([[3 + 1.5, 4 + 4.0, 1 + 2.5]]))
        found = tuned.tensors()
        torch.testing.assert_close(found["weight"], torch.tensor([3.0, -4.0, 1.0]))
        torch.testing.assert_close(found["bias"], torch.tensor([1.5, 4.0, 2.5]))
        assert bias.tolist() == [1.0, 2.0, 3.0]

    def test_tensors_make_the_same_norm(self) -> None:
        generator = torch.Generator().manual_seed(0)
        tuned = TunableNorm(self.norm(), None, biased=True)
        assert tuned.tensors()["bias"].tolist() == [0.0, 0.0, 0.0]
        for parameter in (tuned.gain, tuned.shift):
            assert parameter is not None
            parameter.data += torch.randn(3, generator=generator)
        x = torch.randn(7, 3, generator=generator)
        normed = x / x.square().mean(1, keepdim=True).sqrt()
        found = tuned.tensors()
        torch.testing.assert_close(tuned(x), normed * found["weight"] + found["bias"])
        assert not any(value.requires_grad for value in found.values())

    def test_a_norm_that_adds_to_its_weight(self) -> None:
        """Gemma's multiplies by one plus its weight."""
        norm = Gemma3RMSNorm(3, eps=0)
        norm.weight = nn.Parameter(torch.tensor([1.0, -5.0, -0.5]))
        tuned = TunableNorm(norm, None, biased=True, offset=1.0)
        assert tuned.shift is not None
        tuned.gain.data = torch.tensor([1.5, 1.0, 2.0])
        tuned.shift.data = torch.tensor([0.25, 0.5, -1.0])
        found = tuned.tensors()
        # The weights of `test_by_hand`, less one.
        torch.testing.assert_close(found["weight"], torch.tensor([2.0, -5.0, 0.0]))
        torch.testing.assert_close(found["bias"], torch.tensor([0.5, 2.0, -0.5]))
        x = torch.tensor([[1.0, -1.0, 1.0], [2.0, 1.0, 0.0]])
        expected = tuned(x)
        norm.weight = nn.Parameter(found["weight"])
        torch.testing.assert_close(norm(x) + found["bias"], expected)

    def test_gradients_and_back(self) -> None:
        tuned, x = TunableNorm(self.norm(), None, biased=True), torch.tensor([[1.0, -1.0, 1.0]])
        kept = tuned.kept()
        (tuned(x) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
        found = dict(tuned.gradients())
        # The weighted output, and the size of the weights times what they count.
        torch.testing.assert_close(found["gain"], torch.tensor([2.0, 8.0, 1.5]))
        torch.testing.assert_close(found["shift"], torch.tensor([2.0, 8.0, 1.5]))
        for name, value in tuned.tuned().items():
            value += 1
            assert not torch.equal(value, kept[name])
        assert tuned(x).tolist() != [[2.0, 4.0, 0.5]]
        tuned.restore(kept)
        torch.testing.assert_close(tuned(x), torch.tensor([[2.0, 4.0, 0.5]]))

    def test_without_a_bias(self) -> None:
        tuned = TunableNorm(self.norm().requires_grad_(False), None, biased=False)
        assert [name for name, _ in tuned.named_parameters() if _.requires_grad] == ["gain"]
        assert tuned.tensors().keys() == {"weight"}
        assert tuned.tuned().keys() == {"gain"}
        x = torch.tensor([[1.0, -1.0, 1.0]])
        torch.testing.assert_close(tuned(x), torch.tensor([[2.0, 4.0, 0.5]]))
