"""Test that a multimodal Gemma 3 converts to the same file as its text model, and as in llama.cpp's converter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3ForConditionalGeneration,
)

from d2q_edge.conversion import convert
from d2q_edge.errors import D2QError
from d2q_edge.export.model_file import export
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.model.blocks import BlockRunner
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from d2q_edge.model.multimodal import is_multimodal, text_config, text_names
from d2q_edge.options import Options
from tests.family_models import write_model
from tests.real_configs import REAL
from tools.whole_model import WholeModel

CPU = torch.device("cpu")
TOKENS = np.random.default_rng(5).integers(0, 4000, (2, 100))
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "model_type": "siglip_vision_model",
}  # fmt: skip
PUBLISHED = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}
"""config.json of the published 4B model."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the text model alone."""
    return write_model(tmp_path_factory.mktemp("plain") / "tiny", "gemma3")


@pytest.fixture(scope="module", params=["saved", "in memory"])
def multimodal(request: pytest.FixtureRequest, plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same with a vision tower, with the tensor names of saved files or of transformers in memory."""
    directory = shutil.copytree(plain, tmp_path_factory.mktemp("multimodal") / "tiny")
    config = json.loads((plain / "config.json").read_text())
    tokens = {key: config.pop(key) for key in list(config) if key.endswith("_token_id")}
    whole = AutoConfig.for_model("gemma3", text_config=config, vision_config=VISION, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(whole).bfloat16()
    model.save_pretrained(directory)
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**settings, **tokens}))
    saved, text = load_file(directory / "model.safetensors"), load_file(plain / "model.safetensors")
    vision = {name: tensor for name, tensor in saved.items() if "vision" in name or "multi_modal" in name}
    assert len(vision) > 10
    wrapped = {f"language_model.{name}": tensor for name, tensor in text.items()}
    assert wrapped.keys() | vision.keys() == saved.keys()
    if request.param == "in memory":
        wrapped = {"model.language_model." + name.removeprefix("model."): text[name] for name in text}
        vision = {f"model.{name}": tensor for name, tensor in vision.items()}
        assert wrapped.keys() | vision.keys() == model.state_dict().keys() - {"lm_head.weight"}
    save_file({**wrapped, **vision}, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.slow
def test_file_is_the_stock_converters(
    multimodal: Path,
    stock_convert: Callable[[Path, str, str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    export(multimodal, tmp_path / "ours.gguf", "f16")
    assert "the model's part for images is left out; the file is for text" in capsys.readouterr().err
    ours, theirs = GGUFFile(tmp_path / "ours.gguf"), GGUFFile(stock_convert(multimodal, "f16", "qwen2"))
    assert ours.kv == theirs.kv
    assert list(ours.tensors) == list(theirs.tensors)
    for name in ours.tensors:
        assert np.array_equal(ours.raw(name), theirs.raw(name)), name


@torch.inference_mode()
@pytest.mark.slow
def test_it_is_the_text_model(multimodal: Path, plain: Path, tmp_path: Path) -> None:
    """The text model is the same in transformers, block by block, as a whole, and in the quantized file."""
    model = Gemma3ForConditionalGeneration.from_pretrained(multimodal, dtype=torch.float32).eval()
    tokens = torch.from_numpy(TOKENS)
    expected = model(tokens).logits
    checkpoint = Checkpoint.open(multimodal)
    family = family_for(checkpoint.config)
    checkpoint.check(family.tensor_shapes())
    whole = WholeModel(checkpoint, family, {}, CPU)
    found = whole.log_probabilities(whole.states(tokens))
    torch.testing.assert_close(found, expected.log_softmax(-1), rtol=1e-4, atol=1e-4)
    runner = BlockRunner(checkpoint, family, CPU)
    hidden = runner.embed(tokens)
    for index in range(family.num_layers):
        hidden = runner.forward(runner.load(index), hidden)
    torch.testing.assert_close(runner.final_norm()(hidden), whole.states(tokens), rtol=1e-4, atol=1e-4)
    options = Options(calibration_tokens=256, context=32)
    for model_directory, name in ((plain, "plain.gguf"), (multimodal, "multimodal.gguf")):
        convert(model_directory, tmp_path / name, options)
    one, other = GGUFFile(tmp_path / "plain.gguf"), GGUFFile(tmp_path / "multimodal.gguf")
    assert one.tensors.keys() == other.tensors.keys()
    assert all(np.array_equal(one.raw(name), other.raw(name)) for name in one.tensors)


def test_published_config() -> None:
    family = family_for(text_config(PUBLISHED))
    assert (family.num_layers, family.hidden_size, family.num_heads, family.num_kv_heads) == (34, 2560, 8, 4)
    assert (family.head_dim, family.vocab_size, family.context_length) == (256, 262208, 131072)
    assert (family.rope_type, family.rope_scaling["factor"], family.rope_theta) == ("linear", 8.0, 1e6)
    assert family.sliding_window(0) == 1024 and family.sliding_window(5) is None
    assert family.tied_embeddings
    assert text_config(PUBLISHED)["eos_token_id"] == [1, 106]


MINISTRAL = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "model_type": "mistral3",
    "text_config": {**REAL["Ministral-3-3B"][1], "architectures": None},
    "vision_config": {"hidden_size": 1024, "model_type": "pixtral"},
}
QWEN35 = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "model_type": "qwen3_5",
    "text_config": {key: value for key, value in REAL["Qwen3.5-0.8B"][1].items() if key != "tie_word_embeddings"},
    "tie_word_embeddings": True,
    "vision_config": {"hidden_size": 768, "model_type": "qwen3_5_vision"},
}


@pytest.mark.parametrize(("config", "name"), [(MINISTRAL, "Ministral-3-3B"), (QWEN35, "Qwen3.5-0.8B")])
def test_other_families(config: dict[str, Any], name: str) -> None:
    family, text = family_for(text_config(config)), family_for(REAL[name][1])
    assert type(family) is type(text)
    assert family.tensor_shapes() == text.tensor_shapes()
    assert family.rope_scaling == text.rope_scaling
    assert is_multimodal(config)


PIXTRAL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16,
    "image_size": 28, "patch_size": 14, "model_type": "pixtral",
}  # fmt: skip
GEMMA4_VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 64, "model_type": "gemma4_vision",
}  # fmt: skip
QWEN_VISION = {
    "hidden_size": 32, "intermediate_size": 64, "depth": 1, "num_heads": 2, "out_hidden_size": 64,
    "model_type": "qwen3_5_vision",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "whole", "vision"),
    [
        ("ministral3", "mistral3", PIXTRAL),
        ("qwen3.5", "qwen3_5", QWEN_VISION),
        ("gemma4-e", "gemma4", GEMMA4_VISION),
    ],
)
def test_files_of_other_families(
    stock_convert: Callable[[Path, str, str], Path], tmp_path: Path, name: str, whole: str, vision: dict[str, Any]
) -> None:
    """As transformers saves them: the file is that of the text model, and of llama.cpp's converter."""
    plain = write_model(tmp_path / "plain" / "tiny", name)
    directory = shutil.copytree(plain, tmp_path / "multimodal" / "tiny")
    config = json.loads((plain / "config.json").read_text())
    tokens = {key: config.pop(key) for key in list(config) if key.endswith("_token_id")}
    model = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model(whole, text_config=config, vision_config=vision, tie_word_embeddings=name == "gemma4-e")
    ).bfloat16()
    text = AutoModelForCausalLM.from_pretrained(plain)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    model.save_pretrained(directory)
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**settings, **tokens}))
    # The whole model's has its class's token ids.
    shutil.copy(plain / "generation_config.json", directory)
    files = {}
    for each in (plain, directory):
        export(each, tmp_path / "out.gguf", "f16", force=True)
        file = GGUFFile(tmp_path / "out.gguf")
        files[each] = dict(file.kv), {tensor: file.raw(tensor).copy() for tensor in file.tensors}
    theirs = GGUFFile(stock_convert(directory, "f16", "qwen2"))
    assert files[directory][0] == files[plain][0] == theirs.kv
    assert list(files[directory][1]) == list(theirs.tensors)
    for tensor, values in files[directory][1].items():
        assert np.array_equal(values, files[plain][1][tensor]) and np.array_equal(values, theirs.raw(tensor)), tensor


def test_another_text_model() -> None:
    """Mistral Small 3.1 has Mistral 3's name for the whole, but the first Mistral's text model."""
    config = {**MINISTRAL, "text_config": {"model_type": "mistral"}}
    with pytest.raises(D2QError, match="text model is of the type 'mistral', but only ministral3 is supported in Mis"):
        text_config(config)


def test_parts_that_are_left_out() -> None:
    """Qwen3.5's layers that predict further tokens are beside the text model."""
    names = ["model.language_model.layers.0.linear_attn.A_log", "lm_head.weight"]
    others = ["model.visual.blocks.0.norm1.weight", "mtp.fc.weight", "mtp.layers.0.mlp.up_proj.weight"]
    assert text_names([*names, *others]) == {
        "model.layers.0.linear_attn.A_log": names[0], "lm_head.weight": names[1],
    }  # fmt: skip


def test_names() -> None:
    names = ["language_model.model.norm.weight", "model.language_model.norm.bias", "odd", "model.vision_tower.x"]
    assert text_names([*names, "vision_tower.y", "multi_modal_projector.z"]) == {
        "model.norm.weight": names[0], "model.norm.bias": names[1], "odd": "odd",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": None}, "has no text_config"),
        ({"text_config": {"num_hidden_layers": "x"}}, "text_config's num_hidden_layers makes no sense: 'x'"),
        ({"text_config": {"num_hidden_layers": 10_001}}, "text_config's num_hidden_layers makes no sense: 10001"),
        ({"text_config": {**PUBLISHED["text_config"], "hidden_size": -1}}, "hidden_size|text_config"),  # type: ignore[dict-item]
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    with pytest.raises(D2QError, match=message):
        family_for(text_config({**PUBLISHED, **change}))
