"""Checkpoints with other tensor names than transformers' are read as the same model, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from d2q_edge.errors import D2QError
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from d2q_edge.model.tensor_names import causal_architecture, standard_names
from tests.family_models import write_model
from tests.opening import refused, rewrite
from tests.quantized_checkpoints import change_config

Make = Callable[..., Path]


def rename(directory: Path, change: Callable[[str], str]) -> None:
    def apply(tensors: dict[str, torch.Tensor]) -> None:
        renamed = {change(name): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(renamed)

    rewrite(directory, apply)


def opened(directory: Path) -> Checkpoint:
    checkpoint = Checkpoint.open(directory)
    checkpoint.check(family_for(checkpoint.config).tensor_shapes())
    return checkpoint


@pytest.mark.parametrize(
    ("change", "notes"),
    [
        (lambda name: f"_orig_mod.{name}", ["without _orig_mod., a wrapper's prefix"]),
        (lambda name: f"module.{name}", ["without module., a wrapper's prefix"]),
        (lambda name: f"module._orig_mod.{name}", ["without module. and _orig_mod., a wrapper's prefix"]),
        (lambda name: f"_orig_mod.module.{name}", ["without _orig_mod. and module., a wrapper's prefix"]),
        (lambda name: name.replace(".self_attn.", "._orig_mod.self_attn."), ["without _orig_mod."]),
        (lambda name: f"_fsdp_wrapped_module.{name}", ["without _fsdp_wrapped_module."]),
        (lambda name: name.replace(".mlp.", "._checkpoint_wrapped_module.mlp."), ["_checkpoint_wrapped_module."]),
        (lambda name: name.removeprefix("model."), ["tensor names have no model. in front"]),
        (lambda name: f"_orig_mod.{name.removeprefix('model.')}", ["without _orig_mod.", "no model. in front"]),
    ],
)
def test_prefixes(make_checkpoint: Make, change: Callable[[str], str], notes: list[str]) -> None:
    directory = make_checkpoint()
    stored = load_file(directory / "model.safetensors")
    rename(directory, change)
    checkpoint = opened(directory)
    assert checkpoint.names == stored.keys()
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in stored.items())
    assert len(checkpoint.notes) == len(notes)
    assert all(part in note for part, note in zip(notes, checkpoint.notes, strict=True))


def test_names_that_collide(make_checkpoint: Make) -> None:
    directory = make_checkpoint()
    rewrite(directory, lambda tensors: tensors.update({"_orig_mod.model.norm.weight": torch.ones(64)}))
    refused(directory, "_orig_mod.model.norm.weight and model.norm.weight would both be model.norm.weight; remove")
    with pytest.raises(D2QError, match=r"module.norm.weight and norm.weight would both be norm.weight"):
        standard_names(["module.norm.weight", "norm.weight"])


def test_a_mixture_is_not_guessed(make_checkpoint: Make) -> None:
    """Where some names begin with model., others without it have another meaning."""
    directory = make_checkpoint()
    rewrite(directory, lambda tensors: tensors.update({"norm.weight": torch.ones(64)}))
    refused(directory, r"tensor norm.weight in .* has no place in this architecture")


def test_module_is_a_wrapper_in_front_only() -> None:
    assert standard_names(["model.module.x"]) == ({"model.module.x": "model.module.x"}, [])


@pytest.mark.parametrize("name", ["qwen3", "smollm2", "gemma3"])
def test_a_base_model_saved_alone(tmp_path: Path, name: str) -> None:
    """transformers' own; without the lm_head of an untied model it would be random."""
    model = write_model(tmp_path / "whole", name)
    AutoModel.from_pretrained(model).save_pretrained(tmp_path / "base")
    if name == "qwen3":
        _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
        assert info["missing_keys"] == {"lm_head.weight"}
        refused(tmp_path / "base", r"has no lm_head.weight, and config.json doesn't tie it .* random numbers; get")
        return
    expected, found = opened(model), opened(tmp_path / "base")
    assert found.names == expected.names
    assert all(torch.equal(found.tensor(key), expected.tensor(key)) for key in expected.names)
    assert found.config["architectures"] == expected.config["architectures"]


def test_architectures() -> None:
    configs: list[dict[str, Any]] = [{"architectures": ["BertModel"], "model_type": "qwen3"}, {"architectures": []}, {}]
    for config in configs:
        assert causal_architecture(config) is config


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_tied_models_with_only_a_head(tmp_path: Path, name: str) -> None:
    model = write_model(tmp_path / "model", name)
    expected = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    rename(model, lambda key: "lm_head.weight" if key == "model.embed_tokens.weight" else key)
    checkpoint = opened(model)
    assert "lm_head.weight" not in checkpoint.names
    assert torch.equal(checkpoint.tensor("model.embed_tokens.weight"), expected)
    assert checkpoint.notes == (
        "there is only lm_head.weight; since config.json ties the embeddings to it, it serves as both",
    )
    loaded = AutoModelForCausalLM.from_pretrained(model)
    assert torch.equal(loaded.get_input_embeddings().weight, expected.to(loaded.dtype))


def test_untied_models_with_one_table(make_checkpoint: Make) -> None:
    for missing, pattern in (
        (
            "lm_head.weight",
            "has no lm_head.weight, and config.json doesn't tie it to the embeddings: transformers would",
        ),
        ("model.embed_tokens.weight", "has no tensor model.embed_tokens.weight, which its config.json calls for"),
    ):
        directory = make_checkpoint(name=missing)
        rewrite(directory, lambda tensors, name=missing: tensors.__delitem__(name))  # type: ignore[misc]
        refused(directory, pattern)
        change_config(directory, tie_word_embeddings=True)
        opened(directory)
