"""Linear and YaRN scaling of rotary embeddings: llama.cpp's converter's file, and transformers' logits in llama.cpp."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM

from d2q_edge.export.model_file import export
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.model.blocks import BlockRunner
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from tests import stock
from tests.export.test_family_exports import llama_logits, original_logits
from tests.family_models import EXPERT_MODELS, ROPE_MODELS, YARN, write_model

TOKENS = np.random.default_rng(0).integers(0, 4000, 200).astype(np.int32)
"""More than the original context of 64."""
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tests must not change them."""
    directory = tmp_path_factory.mktemp("models")
    return {name: write_model(directory / name / "tiny", name) for name in ROPE_MODELS}


def rescaled(model: Path, copy: Path, *, old: bool = False, **changes: Any) -> Path:
    """A copy with other settings; `old` for the spelling of transformers 4."""
    shutil.copytree(model, copy)
    config = json.loads((copy / "config.json").read_text())
    rope = config.pop("rope_parameters")
    if "full_attention" in rope:
        rope["full_attention"] |= changes
    else:
        rope |= changes
    if old:
        config["rope_theta"] = rope.pop("rope_theta")
        rope["type"] = rope.pop("rope_type")
    (copy / "config.json").write_text(json.dumps({**config, "rope_scaling" if old else "rope_parameters": rope}))
    return copy


def errors(actual: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Root mean square of every token's difference, relative to that of all values."""
    found: npt.NDArray[np.float32] = np.sqrt(np.square(actual - expected).mean(1) / np.square(expected).mean())
    return found


@pytest.mark.slow
def test_files_are_the_stock_converters(models: dict[str, Path], pristine_tree: Path, tmp_path: Path) -> None:
    old = rescaled(models["qwen2-yarn"], tmp_path / "old" / "tiny", old=True, extrapolation_factor=1, attn_factor=1.5)
    every = {**models, "old": old}
    files = {name: tmp_path / f"{name}.gguf" for name in every}
    stock.convert(pristine_tree, "qwen2", [(every[name], "f16", file) for name, file in files.items()])
    for name, model in every.items():
        export(model, tmp_path / "ours.gguf", "f16", force=True)
        assert (tmp_path / "ours.gguf").read_bytes() == files[name].read_bytes(), name
    assert "qwen2.rope.scaling.yarn_attn_factor" in GGUFFile(files["old"]).kv


@pytest.mark.parametrize("name", ROPE_MODELS)
def test_logits_are_those_of_transformers(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    export(models[name], tmp_path / "out.gguf", "f32")
    expected, actual = original_logits(models[name], TOKENS), llama_logits(tmp_path / "out.gguf", TOKENS)
    found = errors(actual, expected)
    # llama.cpp keeps keys and values in 16 bits; a token may take another expert for that.
    experts = any(name.startswith(start) for start in EXPERT_MODELS)
    for part in (found[:64], found[64:]):
        assert (np.median(part) if experts else part.max()) < 0.01
    assert np.median(errors(llama_logits(tmp_path / "out.gguf", TOKENS[:40]), expected[:40])) < 0.01
    factor = rescaled(models[name], tmp_path / "other", factor=2.0)
    assert np.median(errors(actual, original_logits(factor, TOKENS))) > 0.05, "the factor matters"


@pytest.mark.parametrize(
    ("name", "changes", "written"),
    [
        ("qwen2-yarn", {"attention_factor": 1.0}, True),
        ("qwen2-yarn", {"mscale": 1.0, "mscale_all_dim": 0.5}, True),
        ("qwen2-yarn", {"mscale": 3.0}, False),
        ("qwen2-yarn", {"factor": 0.5}, False),
        ("ministral3-yarn", {"mscale_all_dim": 0.5}, False),
        ("ministral3-yarn", {"mscale": 2.0, "mscale_all_dim": 0.5}, True),
        ("ministral3-yarn", {"attention_factor": 1.2}, True),
    ],
)
def test_attention_factors(
    models: dict[str, Path], tmp_path: Path, name: str, changes: dict[str, Any], written: bool
) -> None:
    """What llama.cpp's converter writes of them, or doesn't, has no effect in llama.cpp."""
    model = rescaled(models[name], tmp_path / "model", **changes)
    export(model, tmp_path / "out.gguf", "f32")
    actual = llama_logits(tmp_path / "out.gguf", TOKENS)
    assert errors(actual, original_logits(model, TOKENS)).max() < 0.01
    file = GGUFFile(tmp_path / "out.gguf")
    assert (f"{file.kv['general.architecture']}.rope.scaling.attn_factor" in file.kv) == written
    checkpoints = [Checkpoint.open(each) for each in (file.path, model)]
    runners = [BlockRunner(each, family_for(each.config), CPU) for each in checkpoints]
    hidden = torch.randn((1, 200, 64), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        outputs = [runner.forward(runner.load(0), hidden) for runner in runners]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama-linear", "smollm3-yarn"])
@torch.inference_mode()
def test_blocks_are_the_model(models: dict[str, Path], name: str) -> None:
    checkpoint = Checkpoint.open(models[name])
    runner = BlockRunner(checkpoint, family_for(checkpoint.config), CPU)
    tokens = torch.from_numpy(TOKENS).long()[None]
    hidden = runner.embed(tokens)
    for index in range(runner.family.num_layers):
        hidden = runner.forward(runner.load(index), hidden)
    model = AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float32).eval()
    expected = model.model(tokens, use_cache=False).last_hidden_state
    torch.testing.assert_close(runner.final_norm()(hidden), expected, rtol=1e-4, atol=1e-4)


def test_without_an_original_context(models: dict[str, Path], tmp_path: Path) -> None:
    """transformers scales from max_position_embeddings then; llama.cpp's converter fails."""
    model = rescaled(models["qwen3-yarn"], tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    del config["rope_parameters"]["original_max_position_embeddings"]
    (model / "config.json").write_text(json.dumps(config))
    export(model, tmp_path / "out.gguf", "f32")
    assert GGUFFile(tmp_path / "out.gguf").kv["qwen3.rope.scaling.original_context_length"] == 512
    actual = llama_logits(tmp_path / "out.gguf", TOKENS)
    assert errors(actual, original_logits(model, TOKENS)).max() < 0.01
    assert errors(actual, original_logits(models["qwen3-yarn"], TOKENS)).max() > 0.03


def test_context_shorter_than_scaled(models: dict[str, Path], tmp_path: Path) -> None:
    def notes(model: Path) -> tuple[str, ...]:
        return family_for(Checkpoint.open(model).config).notes

    assert YARN["factor"] * YARN["original_max_position_embeddings"] <= 512  # type: ignore[operator]
    assert notes(models["qwen2-yarn"]) == notes(models["llama-linear"]) == ()
    assert notes(rescaled(models["qwen2-yarn"], tmp_path / "more", factor=16)) == (
        "YaRN scales the model's context to 1024 tokens, but max_position_embeddings in config.json, which the file "
        "repeats, says 512",
    )
