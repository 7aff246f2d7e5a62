"""Rotation against dense matrices, and the rotated model against the original in transformers and in llama.cpp."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from d2q_edge.errors import D2QError
from d2q_edge.export.model_file import FILE_TYPES, export, model_tensors, model_tokenizer, write_model
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.model.blocks import BlockRunner
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from d2q_edge.model.rotated_checkpoint import RotatedCheckpoint
from d2q_edge.quantize import rotation
from d2q_edge.quantize.rotation import Rotation, group_size, walsh_hadamard
from d2q_edge.runtime.llama_model import LlamaModel
from tests.availability import require_runtime
from tests.float64_model import TOKENS, float64_logits, relative_difference
from tools.make_outliers import make_outliers

Make = Callable[..., Path]
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"hidden_size": 96, "mlp_bias": True, "tie_word_embeddings": True, "dtype": torch.float16}),
    ("llama", {"hidden_size": 384, "num_key_value_heads": 4}),
    ("qwen2", {"hidden_size": 96, "tie_word_embeddings": True}),
    ("qwen2", {"hidden_size": 256, "num_key_value_heads": 1, "shards": 2}),
    ("qwen3", {"hidden_size": 100, "dtype": torch.float32}),
    ("qwen3", {"tie_word_embeddings": True, "shards": 2}),
]


def opened(model: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Checkpoint, RotatedCheckpoint]:
    checkpoint = Checkpoint.open(model)
    checkpoint.check(family_for(checkpoint.config).tensor_shapes())
    return checkpoint, RotatedCheckpoint(checkpoint, seed, dtype)


def tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.tensor(name) for name in checkpoint.names}


def dense(rotated: Rotation) -> torch.Tensor:
    """Q [width, width], from Sylvester's definition: entry (i, j) of H is (-1)^(number of ones in i AND j)."""
    group, width = rotated.group, len(rotated.signs)
    signs = [[(-1) ** (i & j).bit_count() for j in range(group)] for i in range(group)]
    hadamard = torch.tensor(signs, dtype=torch.float64) / math.sqrt(group)
    blocks: torch.Tensor = torch.block_diag(*[hadamard] * (width // group))
    return rotated.signs[:, None] * blocks


@pytest.mark.parametrize(
    ("width", "group"), [(4096, 128), (128, 128), (896, 128), (576, 64), (96, 32), (100, 4), (64, 64), (7, 1)]
)
def test_group_size(width: int, group: int) -> None:
    assert group_size(width) == group


def test_walsh_hadamard_by_hand() -> None:
    vector = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
    assert walsh_hadamard(vector).tolist() == [6.0, -2.0, -3.0, 1.0]
    assert walsh_hadamard(vector[:1]).tolist() == [1.0]
    for size in (0, 3, 12):
        with pytest.raises(ValueError, match=f"{size} is not a power of two"):
            walsh_hadamard(torch.zeros(2, size))


class TestMatrix:
    @pytest.mark.parametrize("width", [96, 384])
    @pytest.mark.parametrize("chunk", [1, 1000, 1 << 17])
    def test_against_dense(self, width: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rotation, "CHUNK", chunk)
        turn = Rotation(width, 3)
        matrix = dense(turn)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-14)
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(40, width, generator=generator)
        norm = torch.randn(width, generator=generator)
        double = weight.double()
        exact = partial(torch.testing.assert_close, rtol=0, atol=1e-13)
        found = turn.inputs(weight, norm, torch.float64)
        exact(found, double @ torch.diag(norm.double()) @ matrix)
        exact(turn.inputs(weight, dtype=torch.float64), double @ matrix)
        exact(turn.inputs(weight[0], dtype=torch.float64), double[0] @ matrix)
        exact(turn.outputs(weight.T, torch.float64), matrix.T @ double.T)
        # Rounded once, at the end.
        assert torch.equal(turn.inputs(weight, norm), found.float())
        assert torch.equal(turn.outputs(weight.T), turn.outputs(weight.T, torch.float64).float())
        assert turn.outputs(weight.T).is_contiguous()

    def test_signs(self) -> None:
        signs = Rotation(4096, 0).signs
        assert set(signs.tolist()) == {-1.0, 1.0}
        assert abs(signs.mean()) < 0.1
        groups = signs.reshape(-1, 128)
        assert len(groups.unique(dim=0)) == 32, "every group has its own"
        assert torch.equal(signs, Rotation(4096, 0).signs)
        assert not torch.equal(signs, Rotation(4096, 1).signs)

    def test_bits_for_a_seed_are_frozen(self) -> None:
        """The same seed must give the same file on other machines and with other versions of torch."""
        assert Rotation(16, 0).signs.tolist() == [-1, 1, 1, -1, 1, 1, 1, 1, 1, 1, 1, -1, -1, 1, -1, -1]


class TestCheckpoint:
    @pytest.mark.parametrize(("family", "options"), MODELS)
    def test_logits_stay_in_float64(self, make_checkpoint: Make, family: str, options: dict[str, Any]) -> None:
        path = make_checkpoint(family, **options)
        original, rotated = opened(path, seed=1, dtype=torch.float64)
        expected = float64_logits(path, tensors(original), tied=options.get("tie_word_embeddings", False))
        after = tensors(rotated)
        assert relative_difference(float64_logits(path, after, tied=False), expected) < 1e-11
        # It is another basis, in which the norms have no weights left.
        for name, tensor in after.items():
            head = name == "lm_head.weight" and "lm_head.weight" not in original.names
            before = original.tensor("model.embed_tokens.weight" if head else name).double()
            if name.endswith(("layernorm.weight", "model.norm.weight")):
                assert torch.equal(tensor, torch.ones_like(before))
            elif name.endswith(("q_norm.weight", "k_norm.weight")) or (
                name.endswith("bias") and not name.endswith(("o_proj.bias", "down_proj.bias"))
            ):
                assert torch.equal(tensor, before)
            else:
                assert relative_difference(tensor, before) > 0.3

    @pytest.mark.parametrize(("family", "options"), MODELS[:2])
    @torch.inference_mode()
    def test_blocks_in_float32(self, make_checkpoint: Make, family: str, options: dict[str, Any]) -> None:
        path = make_checkpoint(family, **options)
        original, rotated = opened(path)
        runner = BlockRunner(rotated, family_for(rotated.config), torch.device("cpu"))
        hidden = runner.embed(TOKENS)
        for index in range(2):
            hidden = runner.forward(runner.load(index), hidden)
        normed = hidden * (hidden.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        logits = normed @ rotated.tensor("lm_head.weight").T
        assert logits.dtype == torch.float32
        expected = float64_logits(path, tensors(original), tied=options.get("tie_word_embeddings", False))
        assert relative_difference(logits.double(), expected) < 1e-5

    @pytest.mark.parametrize("tied", [False, True])
    def test_looks_like_a_checkpoint(self, make_checkpoint: Make, tied: bool) -> None:
        path = make_checkpoint("qwen2", tie_word_embeddings=tied)
        original, rotated = opened(path)
        family = family_for(rotated.config)
        assert not family.tied_embeddings
        assert family_for(original.config).tied_embeddings is tied
        rotated.check(family.tensor_shapes())
        assert rotated.directory == original.directory
        assert list(rotated.names) == sorted(family.tensor_shapes()), "as in a file with a head"
        for name in rotated.names:
            tensor = rotated.tensor(name)
            assert tensor.shape == rotated.shape(name)
            assert tensor.dtype == rotated.dtype(name) == torch.float32
        assert rotated.config == {**original.config, "tie_word_embeddings": False}
        for method in (rotated.tensor, rotated.dtype, rotated.shape):
            with pytest.raises(D2QError, match="has no tensor nonsense"):
                method("nonsense")

    def test_redundant_head_takes_the_norm_along(self, make_checkpoint: Make) -> None:
        path = make_checkpoint(tie_word_embeddings=True)
        plain = opened(path)[1]
        stored = load_file(path / "model.safetensors")
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
        save_file(stored, path / "model.safetensors")
        redundant = opened(path)[1]
        assert list(redundant.names) == list(plain.names)
        assert torch.equal(redundant.tensor("lm_head.weight"), plain.tensor("lm_head.weight"))

    def test_the_seed_decides(self, make_checkpoint: Make) -> None:
        path, name = make_checkpoint(), "model.layers.1.mlp.down_proj.weight"
        first, again, other = (opened(path, seed)[1].tensor(name) for seed in (7, 7, 8))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_damage_is_found(self, make_checkpoint: Make) -> None:
        """A norm's values are not in its own tensor any more, but in those of others."""
        path = make_checkpoint()
        stored = load_file(path / "model.safetensors")
        stored["model.layers.0.input_layernorm.weight"][3] = torch.nan
        save_file(stored, path / "model.safetensors")
        rotated = opened(path)[1]
        for name in ("model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.k_proj.weight"):
            with pytest.raises(D2QError, match=r"tensor model.layers.0.input_layernorm.weight in .* contains NaN"):
                rotated.tensor(name)

    def test_outlier_channels_of_the_norms_vanish(self, make_checkpoint: Make, tmp_path: Path) -> None:
        plain = make_checkpoint("llama")
        make_outliers(plain, tmp_path / "outliers", 0.5, 0)
        name = "model.layers.0.mlp.gate_proj.weight"
        expected, found = (opened(path)[1].tensor(name) for path in (plain, tmp_path / "outliers"))
        assert relative_difference(found, expected) < 1e-6
        assert opened(tmp_path / "outliers")[0].tensor(name).abs().max() > 3 * found.abs().max()


@pytest.mark.parametrize(("family", "options"), [("llama", MODELS[0][1]), ("qwen2", MODELS[3][1])])
def test_llama_cpp_computes_the_same(
    make_checkpoint: Make, tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    path = make_checkpoint(family, **options)
    _, rotated = opened(path)
    bound = family_for(rotated.config)
    files = [tmp_path / "original.gguf", tmp_path / "rotated.gguf"]
    export(path, files[0], "f32")
    tokenizer = model_tokenizer(rotated, bound)
    write_model(files[1], rotated, bound, tokenizer, model_tensors(rotated, bound, "f32"), file_type=FILE_TYPES["f32"])
    assert {info.type_name for info in GGUFFile(files[1]).tensors.values()} == {"f32"}
    require_runtime()
    found = []
    for file in files:
        with LlamaModel(file, 32, 1) as model:
            found.append(model.logits(TOKENS[0].numpy().astype(np.int32), 0).astype(np.float64))
    # Its cache of keys and values is float16.
    assert np.abs(found[1] - found[0]).max() / np.abs(found[0]).max() < 1e-3
