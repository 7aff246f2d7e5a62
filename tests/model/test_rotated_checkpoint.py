"""The rotated checkpoint against the original, in transformers and in llama.cpp."""

from collections.abc import Callable
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
