"""A GGUF file as a checkpoint: what is read back for every family, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from d2q_edge.conversion import convert
from d2q_edge.errors import D2QError
from d2q_edge.export.model_file import export
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.model.blocks import BlockRunner
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from d2q_edge.model.families.delta_net import GatedDeltaNet
from d2q_edge.model.families.gguf_keys import GGUFKeys
from d2q_edge.model.families.llama import Llama
from d2q_edge.model.families.mamba2 import Mamba2
from d2q_edge.model.rotated_checkpoint import RotatedCheckpoint
from d2q_edge.options import Options
from tests.family_models import EXPERT_MODELS, MODELS, ROPE_MODELS
from tests.gguf_files import changed
from tests.opening import refused

CPU = torch.device("cpu")
ALL = (*MODELS, *EXPERT_MODELS, *ROPE_MODELS)


@pytest.fixture
def file(every_f32_file: dict[str, Path]) -> Path:
    return every_f32_file["llama3"]


@pytest.mark.parametrize("name", ALL)
def test_every_tensor_is_the_checkpoints(
    every_model: dict[str, Path], every_f32_file: dict[str, Path], name: str
) -> None:
    original, found = Checkpoint.open(every_model[name]), Checkpoint.open(every_f32_file[name])
    shapes = family_for(original.config).tensor_shapes()
    assert family_for(found.config).tensor_shapes() == shapes
    found.check(shapes)
    assert found.names == original.names
    for tensor in original.names:
        assert found.shape(tensor) == original.shape(tensor)
        assert found.dtype(tensor) == found.tensor(tensor).dtype == torch.float32
        if tensor.endswith("A_log"):
            # The file has the exponential.
            torch.testing.assert_close(found.tensor(tensor), original.tensor(tensor).float(), rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(found.tensor(tensor), original.tensor(tensor).float()), tensor
    assert found.notes == ()


@pytest.mark.parametrize("name", ALL)
@torch.inference_mode()
def test_blocks_compute_the_same(every_model: dict[str, Path], every_f32_file: dict[str, Path], name: str) -> None:
    """With more tokens than any sliding window and than Phi-4-mini's original context."""
    runners = []
    for model in (every_model[name], every_f32_file[name]):
        checkpoint = Checkpoint.open(model)
        runners.append(BlockRunner(checkpoint, family_for(checkpoint.config), CPU))
    original, found = runners
    rows = torch.randn((1, 300, original.family.hidden_size), generator=torch.Generator().manual_seed(1))
    hidden = original.begin(rows, torch.arange(300)[None])
    # The file of a Mistral with a window is that of one without.
    known = 64 if name == "mistral-window" else 300
    for index in {0, original.family.num_layers - 1}:
        expected = original.forward(original.load(index), hidden)
        assert torch.equal(found.forward(found.load(index), hidden)[:, :known], expected[:, :known])
    assert torch.equal(found.final_norm()(rows), original.final_norm()(rows))
    assert found.family.embedding_scale == original.family.embedding_scale
    assert found.family.logit_scale == original.family.logit_scale
    assert found.family.logit_cap == original.family.logit_cap


@pytest.mark.parametrize("name", ALL)
def test_importing_undoes_exporting(every_model: dict[str, Path], name: str) -> None:
    """For every tensor of every family, with values that survive adding one."""
    family = family_for(Checkpoint.open(every_model[name]).config)
    generator = torch.Generator().manual_seed(0)
    moved = set()
    for tensor, shape in family.tensor_shapes().items():
        values = torch.randint(-512, 512, shape, generator=generator) / 256
        exported = family.export_rows(tensor, family.export_values(tensor, values))
        assert isinstance(exported, torch.Tensor)
        moved |= {tensor.rpartition(".")[0].rpartition(".")[2]} if not torch.equal(exported, values) else set()
        back = family.import_values(tensor, family.import_rows(tensor, exported))
        assert isinstance(back, torch.Tensor)
        assert torch.equal(back, values) or (tensor.endswith("A_log") and torch.allclose(back, values)), tensor
    rows = {"q_proj", "k_proj"} if isinstance(family, Llama) else set()
    if isinstance(family, Mamba2):
        rows |= {"mamba"}  # A_log
    if isinstance(family, GatedDeltaNet):
        rows = {"linear_attn"}  # A_log and dt_bias
        if family.value_heads != family.key_heads:
            rows |= {"in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "conv1d", "out_proj"}
    assert (moved if not family.norm_offset else moved - {"norm", "q_norm", "k_norm"}) == {
        *rows,
        *({norm for norm in family.block_norms(0) if "." not in norm} if family.norm_offset else ()),
    }


def test_sixteen_bits_stay_as_they_are(every_model: dict[str, Path], tmp_path: Path) -> None:
    for type_name, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        export(every_model["llama3"], tmp_path / f"{type_name}.gguf", type_name, verify=False)
        original, found = Checkpoint.open(every_model["llama3"]), Checkpoint.open(tmp_path / f"{type_name}.gguf")
        for name in ("lm_head.weight", "model.layers.1.self_attn.k_proj.weight"):
            assert found.dtype(name) is found.tensor(name).dtype is dtype
            assert torch.equal(found.tensor(name), original.tensor(name).to(dtype))
        assert found.dtype("model.norm.weight") is torch.float32
        assert found.notes == ()


@pytest.mark.parametrize("type_name", ["q8_0", "q4_1", "q5_k"])
def test_quantized_types(every_model: dict[str, Path], tmp_path: Path, type_name: str) -> None:
    """Against gguf-py's own reader, rows of q put in order by hand."""
    path = tmp_path / "out.gguf"
    export(every_model["llama3"], path, type_name, verify=False)
    reader = gguf.GGUFReader(path)
    raw = {tensor.name: tensor for tensor in reader.tensors}
    found = Checkpoint.open(path)
    for name, stored in (
        ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
        ("model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight"),
    ):
        values = gguf.quants.dequantize(raw[stored].data, raw[stored].tensor_type)
        if "q_proj" in name:  # 4 heads of 16: pairs of rows become halves of a head
            values = np.concatenate(
                [values[16 * head + half : 16 * head + 16 : 2] for head in range(4) for half in (0, 1)]
            )
        np.testing.assert_array_equal(found.tensor(name).numpy(), values)
    lossy = {kind.name.lower() for kind in {tensor.tensor_type for tensor in raw.values()}} - {"f32", "q8_0"}
    assert len(found.notes) == bool(lossy)
    assert all(kind in found.notes[0] and "stays lost" in found.notes[0] for kind in lossy)


def test_one_expert_is_read_at_a_time(every_f32_file: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, sizes = Checkpoint.open(every_f32_file["qwen3moe"]), []
    raw = GGUFFile.raw

    def noting(self: GGUFFile, name: str, part: int | None = None) -> Any:
        sizes.append(raw(self, name, part).nbytes)
        return raw(self, name, part)

    monkeypatch.setattr(GGUFFile, "raw", noting)
    checkpoint.tensor("model.layers.1.mlp.experts.3.down_proj.weight")
    assert sizes == [64 * 64 * 4]


def test_rope_factors_by_llama_3s_rule(file: Path) -> None:
    rope = Checkpoint.open(file).config["rope_parameters"]
    expected = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    assert rope == {"rope_type": "llama3", "rope_theta": 500.0, **expected}


def test_any_other_rope_factors(file: Path, tmp_path: Path) -> None:
    """The rotary module divides by them, for short and long texts, and they are written again."""
    factors = np.array([1, 1.25, 1.5, 2, 3, 5, 8, 8.5], np.float32)
    source = changed(file, tmp_path / "in.gguf", tensors={"rope_freqs.weight": factors})
    checkpoint = Checkpoint.open(source)
    rotary = BlockRunner(checkpoint, family_for(checkpoint.config), CPU)._rotary
    assert rotary is not None
    exponents = torch.arange(0, 16, 2).float() / 16
    for length in (10, 500):
        positions = torch.arange(length)[None]
        cosines, _ = rotary(torch.zeros(1, length, 1), positions)
        angles = positions[0, :, None] / (torch.from_numpy(factors) * 500**exponents)
        torch.testing.assert_close(cosines[0, :, :8], angles.cos(), rtol=0, atol=2e-5)
    export(source, tmp_path / "out.gguf", "f32")
    assert GGUFFile(tmp_path / "out.gguf").dequantize("rope_freqs.weight").tolist() == factors.tolist()


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, {"rope_type": "default"}),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {"rope_type": "default"}),
        ({"rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 1.0, "rope.scaling.attn_factor": 0.5},
            {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 512, "attention_factor": 0.5},
        ),
    ],
)
def test_rope_scaling_keys(
    every_f32_file: dict[str, Path], tmp_path: Path, keys: dict[str, Any], expected: dict[str, Any]
) -> None:
    path = changed(every_f32_file["qwen2"], tmp_path / "x.gguf", {f"qwen2.{key}": value for key, value in keys.items()})
    assert GGUFKeys(GGUFFile(path), "qwen2").rope_scaling() == expected


def test_a_head_of_the_default_width(every_f32_file: dict[str, Path], tmp_path: Path) -> None:
    """Without a key for it, llama.cpp divides, where transformers has a default of 128."""
    keys = {"qwen3.attention.key_length": None, "qwen3.attention.value_length": None}
    refused(
        changed(every_f32_file["qwen3"], tmp_path / "x.gguf", keys),
        r"shape \[128, 64\], but the file's keys imply \[64, 64\]",
    )


def test_a_rotated_file(every_model: dict[str, Path], every_f32_file: dict[str, Path]) -> None:
    original, found = (
        RotatedCheckpoint(Checkpoint.open(paths["smollm2"]), 3) for paths in (every_model, every_f32_file)
    )
    assert found.gguf is not None and found.notes == ()
    assert found.names == original.names
    for name in ("lm_head.weight", "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        assert torch.equal(found.tensor(name), original.tensor(name))


Change = Callable[[Path, Path], Path]


def key(name: str, value: Any) -> Change:
    return lambda file, target: changed(file, target, {name: value})


def tensor(name: str, data: Any) -> Change:
    return lambda file, target: changed(file, target, tensors={name: data})


def cut(file: Path, target: Path) -> Path:
    target.write_bytes(file.read_bytes()[:-100])
    return target


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (cut, "is truncated: it ends after"),
        (lambda file, target: target, "there is no file .*x.gguf"),
        (key("split.count", 3), "is one of 3 parts; join them with llama.cpp's `llama-gguf-split --merge`"),
        (key("general.type", "adapter"), "is of the type 'adapter', not a language model"),
        (key("general.architecture", "clip"), "is a model's part for images or sound, not a language model"),
        (key("llama.pooling_type", 1), "is a model for embeddings or ranking"),
        (key("llama.attention.causal", False), "is a model for embeddings or ranking"),
        (
            key("general.architecture", "bert"),
            "architecture 'bert', which isn't supported; these are: .*gemma3, gemma4, granite, .*llama, .*olmoe",
        ),
        (key("d2q.version", 1), "is a file that d2q-edge has quantized; convert the model that it was made from"),
        (key("llama.block_count", None), "has no key llama.block_count"),
        (key("llama.block_count", 3), r"has no tensor blk.2.attn_q.weight, which its keys call for .*3 blocks"),
        (key("llama.block_count", "two"), "its key llama.block_count is 'two'"),
        (key("llama.attention.head_count", [4, 2]), "llama.attention.head_count differs between blocks"),
        (key("llama.attention.head_count_kv", [2, 1]), "its key llama.attention.head_count_kv differs between blocks"),
        (key("llama.attention.head_count_kv", ["2", "2"]), "its key llama.attention.head_count_kv differs"),
        (key("llama.attention.layer_norm_rms_epsilon", "x"), "layer_norm_rms_epsilon is 'x', not a number"),
        (key("llama.attention.value_length", 8), "its keys and values differ in width"),
        (key("llama.rope.dimension_count", 8), "config.json: a partial_rotary_factor other than 1 isn't supported"),
        (key("llama.rope.scaling.factor", 2.0), "its rope_freqs.weight doesn't suit its settings"),
        (
            key("llama.expert_count", 8),
            "has 8 experts in every block, which isn't supported for the architecture llama",
        ),
        (tensor("rope_freqs.weight", np.ones(4, np.float32)), "its rope_freqs.weight doesn't suit its settings"),
        (tensor("rope_freqs.weight", np.full(8, -1, np.float32)), "short_factor must be a positive number"),
        (tensor("output_norm.weight", None), "has no tensor output_norm.weight"),
        (tensor("token_embd.weight", None), "has no tensor token_embd.weight"),
        (tensor("blk.0.extra.weight", np.ones(4, np.float32)), "tensor blk.0.extra.weight of .* has no place in the"),
        (tensor("blk.0.attn_v.weight", np.ones((4, 64), np.float32)), r"shape \[4, 64\], but .* keys imply \[32, 64\]"),
        (
            tensor("blk.0.ffn_up.weight", (gguf.GGMLQuantizationType.Q8_1, np.zeros((128, 80), np.uint8))),
            "blk.0.ffn_up.weight of .* has the type q8_1, which gguf-py can't decode",
        ),
        (
            tensor("blk.1.ffn_up.weight", np.full((128, 64), np.nan, np.float32)),
            "tensor blk.1.ffn_up.weight in .* contains NaN or infinite values; the file is damaged",
        ),
    ],
)
def test_refusals(file: Path, tmp_path: Path, change: Change, pattern: str) -> None:
    with pytest.raises(D2QError, match=pattern) as caught:
        checkpoint = Checkpoint.open(change(file, tmp_path / "x.gguf"))
        for name in checkpoint.names:
            checkpoint.tensor(name)
    assert "\n" not in str(caught.value) and "x.gguf" in str(caught.value)


def test_a_vocabulary_alone(file: Path, tmp_path: Path) -> None:
    none = dict.fromkeys(GGUFFile(file).tensors)
    refused(changed(file, tmp_path / "x.gguf", tensors=none), "x.gguf has keys but no tensors: it is only a vocabulary")


def test_our_own_types_are_refused(every_model: dict[str, Path], tmp_path: Path) -> None:
    convert(every_model["qwen2"], tmp_path / "x.gguf", Options(calibrate=False))
    refused(tmp_path / "x.gguf", r"x.gguf is a file that d2q-edge has quantized \(d2q2_64\); convert the model")


def test_directories_with_files_and_other_files(every_f32_file: dict[str, Path], tmp_path: Path) -> None:
    refused(every_f32_file["llama3"].parent, r"has no config.json, .*; it holds ernie4_5.gguf: give that file")
    (tmp_path / "model.bin").touch()
    refused(tmp_path / "model.bin", "is not a directory; give the directory that holds config.json, or a .gguf file")
    refused(Path("nobody/nothing.gguf"), "there is no file nobody/nothing.gguf")
