"""The result of a block: the same after saving and loading, and the same module whichever of the two is applied."""

import copy
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from d2q_edge.errors import D2QError
from d2q_edge.formats import tensor_types
from d2q_edge.formats.quantized_block import BlockMetrics, QuantizedBlock, QuantizedWeight, float_array
from d2q_edge.formats.tensor_types import TensorType
from tests.blocks import assert_same_block

CPU = torch.device("cpu")
WIDTH, INNER = 64, 256


class Mlp(nn.Module):
    """Two linear layers, the first with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down(torch.tanh(self.up(hidden)))
        return result


class Block(nn.Module):
    """Like a decoder block, with a router, which is no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.gate = nn.Linear(WIDTH, 2, bias=False)
        self.mlp = Mlp()
        self.last = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        inner = self.norm(hidden)
        result: torch.Tensor = self.last(hidden + self.mlp(inner) * self.gate(inner).softmax(-1)[..., :1])
        return result


def block() -> Block:
    torch.manual_seed(0)
    return Block().requires_grad_(False)


def packed(tensor_type: TensorType, rows: int, columns: int, seed: int) -> QuantizedWeight:
    """Random codes and codebooks, with scales near 0.001."""
    generator = np.random.default_rng(seed)
    blocks = tensor_type.blocks(columns)
    data = generator.integers(0, 256, (rows, blocks, tensor_type.type_size), dtype=np.uint8)
    scales = generator.normal(1e-3, 1e-4, (rows, blocks, 1)).astype(np.float16)
    data[..., :2] = scales.view(np.uint8)
    return QuantizedWeight(tensor_type, data.reshape(rows, -1))


def result() -> QuantizedBlock:
    """Something of every kind, for the modules of Block."""
    generator = np.random.default_rng(0)

    def floats(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return generator.normal(1, 0.1, shape).astype(np.float32)

    return QuantizedBlock(
        weights={
            "mlp.up": packed(tensor_types.D2Q3_64, INNER, WIDTH, 1),
            "mlp.down": packed(tensor_types.D2Q2, WIDTH, INNER, 2),
        },
        floats={
            "norm.weight": floats(WIDTH),
            "mlp.up.bias": floats(INNER),
            "gate.weight": floats(2, WIDTH),
            "last.weight": floats(WIDTH, WIDTH),
        },
        norm_biases={"norm": floats(WIDTH)},
        column_scales={"mlp.up": floats(WIDTH), "mlp.down": floats(INNER)},
        metrics=BlockMetrics(
            {"mlp.up": 0.1, "mlp.down": 1 / 3},
            {"norm": {"applied": True, "norm": 1e-3, "gain": 0.25, "channels": 7}},
        ),
    )


def dequantized(weight: QuantizedWeight) -> torch.Tensor:
    return torch.from_numpy(tensor_types.dequantize(weight.type, weight.data))


def outputs(found: QuantizedBlock) -> torch.Tensor:
    """Of a module that the block is applied to."""
    module = block()
    found.apply(module)
    tokens = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    values: torch.Tensor = module(tokens)
    return values


class TestSaving:
    def test_every_field_comes_back(self, tmp_path: Path) -> None:
        expected = result()
        expected.save(tmp_path / "block.safetensors")
        found = QuantizedBlock.load(tmp_path / "block.safetensors")
        assert_same_block(found, expected)
        assert_same_block(found, result())
        assert all(weight.values is None for weight in found.weights.values())

    def test_an_empty_block(self, tmp_path: Path) -> None:
        QuantizedBlock().save(tmp_path / "block.safetensors")
        assert_same_block(QuantizedBlock.load(tmp_path / "block.safetensors"), QuantizedBlock())

    def test_rows_of_a_larger_matrix(self, tmp_path: Path) -> None:
        """As the solver has them; and a transposed array."""
        whole = packed(tensor_types.D2Q2, 8, 256, 0).data
        rows = QuantizedBlock(weights={"a": QuantizedWeight(tensor_types.D2Q2, whole[3:6])})
        rows.floats["b.weight"] = np.arange(6, dtype=np.float32).reshape(2, 3).T
        rows.save(tmp_path / "block.safetensors")
        found = QuantizedBlock.load(tmp_path / "block.safetensors")
        np.testing.assert_array_equal(found.weights["a"].data, whole[3:6])
        np.testing.assert_array_equal(found.floats["b.weight"], rows.floats["b.weight"])

    def test_names_with_slashes_and_of_sections(self, tmp_path: Path) -> None:
        odd = QuantizedBlock(floats={"floats/a": np.ones(2, np.float32)}, norm_biases={"a/b": np.zeros(1, np.float32)})
        odd.save(tmp_path / "block.safetensors")
        assert_same_block(QuantizedBlock.load(tmp_path / "block.safetensors"), odd)

    def test_damage(self, tmp_path: Path) -> None:
        path = tmp_path / "block.safetensors"
        result().save(path)
        good = path.read_bytes()
        changed = [good[:-1], good[: len(good) // 2], b"", good.replace(b"d2q3_64", b"d2q2_64"), good + b"?"]
        middle = len(good) // 2
        changed.append(good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :])
        for content in changed:
            assert content != good
            path.write_bytes(content)
            with pytest.raises(D2QError, match=r"block.safetensors is damaged .*; remove it and convert again"):
                QuantizedBlock.load(path)

    def test_a_file_of_another_program(self, tmp_path: Path) -> None:
        save_file({"weights/a": np.zeros((1, 74), np.uint8)}, tmp_path / "block.safetensors")
        with pytest.raises(D2QError, match="is damaged"):
            QuantizedBlock.load(tmp_path / "block.safetensors")

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(D2QError, match="is damaged"):
            QuantizedBlock.load(tmp_path / "block.safetensors")

    def test_a_place_that_cannot_be_written(self, tmp_path: Path) -> None:
        with pytest.raises(D2QError, match="can't write"):
            result().save(tmp_path / "none" / "block.safetensors")


def test_update_adds_and_replaces() -> None:
    whole = result()
    part = QuantizedBlock(
        weights={"mlp.down": packed(tensor_types.D2Q3, WIDTH, INNER, 5), "new": packed(tensor_types.Q4_0, 4, 64, 6)},
        floats={"norm.weight": np.zeros(WIDTH, np.float32)},
        norm_biases={"other": np.ones(WIDTH, np.float32)},
        column_scales={"mlp.up": np.full(WIDTH, 2, np.float32)},
        metrics=BlockMetrics({"mlp.down": 0.5}, {"other": {"applied": False}}),
    )
    before = copy.deepcopy(part)
    whole.update(part)
    assert_same_block(part, before)
    expected = result()

    def merged(field: str) -> Mapping[str, object]:
        return {**getattr(expected, field), **getattr(part, field)}

    assert_same_block(
        whole,
        QuantizedBlock(
            **{field: merged(field) for field in ("weights", "floats", "norm_biases", "column_scales")},  # type: ignore[arg-type]
            metrics=BlockMetrics(
                {"mlp.up": 0.1, "mlp.down": 0.5},
                {**expected.metrics.norm_shifts, "other": {"applied": False}},
            ),
        ),
    )


class TestApplying:
    def test_parameters(self) -> None:
        """Weights are what the file's readers dequantize; what isn't in the block stays."""
        module, quantized = block(), result()
        before = {name: parameter.clone() for name, parameter in module.named_parameters()}
        expected = {f"{layer}.weight": dequantized(weight) for layer, weight in quantized.weights.items()}
        expected |= {name: torch.from_numpy(values) for name, values in quantized.floats.items()}
        quantized.apply(module)
        for name, parameter in module.named_parameters():
            assert torch.equal(parameter, expected.get(name, before[name])), name
            assert not parameter.requires_grad
            assert parameter.dtype == torch.float32
        assert len(expected) == len(before)
        QuantizedBlock().apply(module)
        for name, parameter in module.named_parameters():
            assert torch.equal(parameter, expected[name])

    def test_the_bias_of_a_norm_is_added_to_its_output(self) -> None:
        module, quantized = block(), result()
        hidden = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(2))
        QuantizedBlock(floats=quantized.floats).apply(module)
        plain = module.norm(hidden)
        QuantizedBlock(norm_biases=quantized.norm_biases).apply(module)
        assert torch.equal(module.norm(hidden), plain + torch.from_numpy(quantized.norm_biases["norm"]))

    def test_column_scales_are_not_applied(self) -> None:
        """The caller's block has absorbed them."""
        scaled, plain = result(), result()
        plain.column_scales.clear()
        assert torch.equal(outputs(scaled), outputs(plain))

    @pytest.mark.parametrize("solved", [False, True], ids=["packed only", "with the solver's values"])
    def test_loaded_is_like_saved(self, tmp_path: Path, solved: bool) -> None:
        """To the last bit: a resumed conversion goes on from what was loaded."""
        saved = result()
        if solved:
            for weight in saved.weights.values():
                weight.values = dequantized(weight)
        saved.save(tmp_path / "block.safetensors")
        expected = outputs(saved)
        assert torch.equal(outputs(QuantizedBlock.load(tmp_path / "block.safetensors")), expected)
        assert torch.equal(outputs(saved), expected), "also when the values are gone"
        assert not torch.allclose(expected, outputs(QuantizedBlock()), atol=1e-2)

    def test_everything_counts(self) -> None:
        """The comparison above sees every entry."""
        expected = outputs(result())
        for section in ("weights", "floats", "norm_biases"):
            for name in getattr(result(), section):
                other = result()
                del getattr(other, section)[name]
                assert not torch.equal(outputs(other), expected), name


class TestTakingValues:
    def test_they_are_the_solvers_and_then_dequantized(self) -> None:
        weight = packed(tensor_types.D2Q2, 4, 256, 0)
        given = dequantized(weight)
        weight.values = given
        assert weight.take_values(CPU) is given
        assert weight.values is None, "not kept twice"
        again = weight.take_values(CPU)
        assert again is not given
        assert torch.equal(again, given)

    @pytest.mark.parametrize("tensor_type", tensor_types.BY_NAME.values(), ids=lambda each: each.name)
    def test_every_type(self, tensor_type: TensorType) -> None:
        weight = packed(tensor_type, 3, 2 * tensor_type.block_size, 1)
        values = weight.take_values(CPU)
        assert values.dtype == torch.float32
        assert values.shape == (3, 2 * tensor_type.block_size)
        np.testing.assert_array_equal(values, tensor_types.dequantize(tensor_type, weight.data))

    def test_they_are_neither_saved_nor_shown(self, tmp_path: Path) -> None:
        path, one = tmp_path / "block.safetensors", QuantizedBlock({"a": packed(tensor_types.D2Q2, 2, 256, 0)})
        one.save(path)
        expected = path.read_bytes()
        one.weights["a"].values = torch.zeros(2, 256)
        one.save(path)
        assert path.read_bytes() == expected
        assert "values" not in repr(one)


def test_float_arrays() -> None:
    found = float_array(torch.arange(4, dtype=torch.bfloat16).requires_grad_())
    assert found.dtype == np.float32
    assert found.tolist() == [0, 1, 2, 3]
