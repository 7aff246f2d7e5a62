"""Test reading valid checkpoints, and the error message for every kind of invalid one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from d2q_edge.errors import D2QError
from d2q_edge.model.checkpoint import Checkpoint, is_finite
from d2q_edge.model.families import family_for
from tests.opening import refused, rewrite
from tests.paths import ROOT

Make = Callable[..., Path]
INDEX = "model.safetensors.index.json"


def test_example_model() -> None:
    checkpoint = Checkpoint.open(ROOT / "examples" / "tiny-qwen3")
    assert checkpoint.shape("model.embed_tokens.weight") == (4096, 256)
    assert checkpoint.dtype("model.norm.weight") is torch.bfloat16
    assert checkpoint.tensor("model.norm.weight").shape == (256,)
    checkpoint.check(family_for(checkpoint.config).tensor_shapes())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shards", [1, 3])
def test_reads_what_was_written(make_checkpoint: Make, dtype: torch.dtype, shards: int) -> None:
    directory = make_checkpoint("llama", dtype=dtype, shards=shards)
    stored: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        stored.update(load_file(file))
    checkpoint = Checkpoint.open(directory)
    checkpoint.check(family_for(checkpoint.config).tensor_shapes())
    assert checkpoint.names == stored.keys()
    for name, expected in stored.items():
        assert checkpoint.dtype(name) is dtype
        assert torch.equal(checkpoint.tensor(name), expected)


def test_every_load_is_fresh(make_checkpoint: Make) -> None:
    checkpoint = Checkpoint.open(make_checkpoint())
    checkpoint.tensor("model.norm.weight").zero_()
    assert checkpoint.tensor("model.norm.weight").any()


def test_missing_directory(tmp_path: Path) -> None:
    refused(
        tmp_path / "absent", "there is no directory .*absent; give one that holds config.json, or a Hugging Face id"
    )


def test_name_that_no_file_system_takes() -> None:
    refused(Path("x" * 5000), "can't read xxx.*: File name too long")


def test_file_for_a_directory(make_checkpoint: Make) -> None:
    refused(make_checkpoint() / "config.json", "not a directory")


def test_no_config(tmp_path: Path) -> None:
    refused(tmp_path, "no config.json")


@pytest.mark.parametrize(
    ("content", "pattern"), [("{", "isn't valid JSON"), ("[]", "JSON object, not a list"), ("\xff", "isn't valid JSON")]
)
def test_unreadable_config(make_checkpoint: Make, content: str, pattern: str) -> None:
    directory = make_checkpoint()
    (directory / "config.json").write_bytes(content.encode("latin-1"))
    refused(directory, pattern)


def test_no_weights(make_checkpoint: Make) -> None:
    directory = make_checkpoint()
    (directory / "model.safetensors").unlink()
    refused(directory, "has no weights")


def test_pickle_weights_are_refused_with_the_reason(make_checkpoint: Make) -> None:
    directory = make_checkpoint()
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    refused(directory, "pickle files only, which can run any code")
    (directory / "pytorch_model.bin").rename(directory / "consolidated.00.pth")
    refused(directory, "pickle files only, which can run any code")


def test_missing_tensor(make_checkpoint: Make) -> None:
    directory = make_checkpoint()
    rewrite(directory, lambda tensors: tensors.__delitem__("model.layers.1.mlp.up_proj.weight"))
    refused(directory, "no tensor model.layers.1.mlp.up_proj.weight")


def test_unexpected_tensor(make_checkpoint: Make) -> None:
    directory = make_checkpoint()
    rewrite(directory, lambda tensors: tensors.update({"model.layers.0.mlp.gate.weight": torch.zeros(2)}))
    refused(directory, "tensor model.layers.0.mlp.gate.weight .* no place in this architecture")


def test_derived_tensors_are_ignored(make_checkpoint: Make) -> None:
    directory = make_checkpoint()
    rewrite(directory, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    checkpoint = Checkpoint.open(directory)
    checkpoint.check(family_for(checkpoint.config).tensor_shapes())


def test_shape_that_config_denies(make_checkpoint: Make) -> None:
    directory = make_checkpoint()
    rewrite(directory, lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)}))
    refused(directory, re.escape("tensor model.norm.weight has the shape [63], but config.json implies [64]"))


@pytest.mark.parametrize(
    ("dtype", "code"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8"), (torch.float64, "F64")]
)
def test_unsupported_dtype(make_checkpoint: Make, dtype: torch.dtype, code: str) -> None:
    directory = make_checkpoint()
    rewrite(directory, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64).to(dtype)}))
    refused(directory, f"tensor model.norm.weight in .* has dtype {code}; only BF16, F16 and F32")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(make_checkpoint: Make, value: float) -> None:
    directory = make_checkpoint()

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value

    rewrite(directory, poison)
    checkpoint = Checkpoint.open(directory)
    checkpoint.tensor("model.layers.0.mlp.up_proj.weight")
    with pytest.raises(D2QError, match=r"tensor model.layers.1.mlp.up_proj.weight .* NaN or infinite"):
        checkpoint.tensor("model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_is_finite_finds_a_single_value_anywhere(dtype: torch.dtype, value: float) -> None:
    assert is_finite(torch.empty(0, dtype=dtype))
    for size in (1, 7, 300, 70001):
        tensor = torch.linspace(-1, 1, size).to(dtype)
        assert is_finite(tensor)
        for place in {0, size // 3, size // 2 + 1 if size > 1 else 0, size - 1}:
            poisoned = tensor.clone()
            poisoned[place] = value
            assert not is_finite(poisoned)


def test_file_that_vanishes_after_opening(make_checkpoint: Make) -> None:
    directory = make_checkpoint()
    checkpoint = Checkpoint.open(directory)
    (directory / "model.safetensors").unlink()
    with pytest.raises(D2QError, match=r"can't read tensor model.norm.weight"):
        checkpoint.tensor("model.norm.weight")


def test_head_beside_tied_embeddings(make_checkpoint: Make) -> None:
    directory = make_checkpoint(tie_word_embeddings=True)
    rewrite(directory, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    checkpoint = Checkpoint.open(directory)
    checkpoint.check(family_for(checkpoint.config).tensor_shapes())
    rewrite(directory, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"] * 2}))
    refused(directory, "embeddings are tied, but lm_head.weight differs")
