"""Rewritten LoRA adapters: with them, a file whose columns are scaled computes what peft's model computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from d2q_edge.conversion import convert
from d2q_edge.errors import D2QError
from d2q_edge.evaluation.perplexity import evaluate
from d2q_edge.export.adapter import rewrite_adapter
from d2q_edge.export.model_file import export, float_tensor, model_tensors, model_tokenizer, write_model
from d2q_edge.export.scale_keys import scale_keys
from d2q_edge.formats.column_scales import CODES, FIT, USERS, read_scales
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.formats.gguf_writer import GGUFTensor
from d2q_edge.model.blocks import BlockRunner
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from d2q_edge.options import LoadOptions, Options
from d2q_edge.pipeline.column_scaling import absorb_scales
from d2q_edge.runtime.llama_model import LlamaModel
from tests.adapters import ALPHA, PREFIX, RANK, configure, write_adapter
from tests.availability import require_runtime
from tests.checkpoints import EXAMPLE
from tests.command_line import Call, refused
from tests.conftest import ExampleFiles
from tests.family_models import write_model as write_random_model
from tests.gguf_files import changed
from tests.trained_adapters import train_adapter

F32 = npt.NDArray[np.float32]
TOKENS = np.random.default_rng(0).integers(0, 4000, 48).astype(np.int32)


def random_scales(count: int, generator: np.random.Generator) -> F32:
    """Scales that their codes hold exactly."""
    return np.exp2(generator.integers(-16, 17, count) / 8).astype(np.float32)


def write_scaled(path: Path, model: Path) -> None:
    """Write a model in f32 with random column scales, which are absorbed as the pipeline does it."""
    checkpoint = Checkpoint.open(model)
    family, generator = family_for(checkpoint.config), np.random.default_rng(1)
    runner = BlockRunner(checkpoint, family, torch.device("cpu"))
    scales: dict[int, dict[str, F32]] = {}
    weights: dict[str, torch.Tensor] = {}
    for index in range(family.num_layers):
        block, own = runner.load(index), scales.setdefault(index, {})
        for group in family.block_groups(index):
            own[group.linears[0]] = random_scales(family.linear_shape(index, group.linears[0])[1], generator)
            if group.absorber is not None:
                rows = family.absorber_rows(index, group.absorber)
                own[group.linears[0]] = random_scales(rows.max() + 1, generator)[rows]
        absorb_scales(family, index, block, {layer: torch.from_numpy(values) for layer, values in own.items()})
        weights |= {family.block_prefix(index) + name: value for name, value in block.named_parameters()}
    if not family.tied_embeddings:
        head, norm = f"{family.head}.weight", f"{family.final_norm}.weight"
        values = random_scales(family.hidden_size, generator)
        scales[family.num_layers] = {family.head: values}
        weights[head] = checkpoint.tensor(head).float() / torch.from_numpy(values)
        weights[norm] = checkpoint.tensor(norm).float() * torch.from_numpy(values)

    def replaced(name: str) -> GGUFTensor:
        return float_tensor(family, name, "f32", lambda: weights[name])

    tensors = model_tensors(checkpoint, family, "f32", {name: replaced(name) for name in weights})
    extra = {"d2q.recipe": '{"dsq": true}', **scale_keys(family, scales.__getitem__)}
    tokenizer = model_tokenizer(checkpoint, family)
    write_model(path, checkpoint, family, tokenizer, tensors, file_type=0, extra=extra, verify=False)


def adapter_for(directory: Path, model: Path) -> Path:
    """Write an adapter for all layers of the blocks, and the lm_head where it is a layer of its own."""
    family = family_for(Checkpoint.open(model).config)
    modules = [name.removesuffix(".weight") for name in family.linear_weights()]
    return write_adapter(directory, model, [*modules, *([] if family.tied_embeddings else [family.head])])


def merged_logits(model: Path, adapter: Path | None, scale: float = ALPHA / RANK) -> F32:
    """transformers', with the adapter's products added to the weights."""
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tensors = load_file(adapter / "adapter_model.safetensors") if adapter else {}
    with torch.inference_mode():
        for name, a in tensors.items():
            if ".lora_A." in name:
                layer = module.get_submodule(name.removeprefix(PREFIX).removesuffix(".lora_A.weight"))
                layer.get_parameter("weight").add_(scale * tensors[name.replace("lora_A", "lora_B")] @ a)
        logits: F32 = module(torch.from_numpy(TOKENS).long()[None], use_cache=False).logits[0].numpy()
    return logits


def llama_logits(path: Path, *adapters: object) -> F32:
    require_runtime()
    with LlamaModel(path, 64, 1, LoadOptions(lora=tuple(map(str, adapters)))) as model:
        return model.logits(TOKENS, 0).copy()


def error(actual: F32, expected: F32) -> float:
    return float(np.sqrt(np.square(actual - expected).mean() / np.square(expected).mean()))


@pytest.mark.parametrize("name", ["llama3", "smollm2", "qwen3", "gemma3", "phi4-mini", "granite", "lfm2"])
def test_the_effect_is_that_on_the_original(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    model = write_random_model(tmp_path / "model", name, dtype=torch.float32)
    adapter = adapter_for(tmp_path / "adapter", model)
    original, scaled = tmp_path / "original.gguf", tmp_path / "scaled.gguf"
    export(model, original, "f32", verify=False)
    write_scaled(scaled, model)
    for file in (original, scaled):
        rewrite_adapter(str(adapter), file, tmp_path / f"for-{file.name}")
    # A GGUF adapter for the original gives the same as the PEFT one that it was made of.
    rewrite_adapter(str(tmp_path / "for-original.gguf"), scaled, tmp_path / "again.gguf")
    expected, plain = merged_logits(model, adapter), merged_logits(model, None)
    assert error(llama_logits(scaled), plain) < 2e-3 < 0.1 < error(plain, expected)
    capfd.readouterr()
    for file, made in ((original, "for-original.gguf"), (scaled, "for-scaled.gguf"), (scaled, "again.gguf")):
        assert error(llama_logits(file, tmp_path / made), expected) < 2e-3
    assert capfd.readouterr().err == ""
    assert error(llama_logits(scaled, tmp_path / "for-original.gguf"), expected) > 0.1
    assert "is made for the original model" in capfd.readouterr().err
    half = llama_logits(scaled, f"{tmp_path / 'for-scaled.gguf'}:0.5")
    assert error(half, merged_logits(model, adapter, ALPHA / RANK / 2)) < 2e-3
    twice = llama_logits(scaled, *2 * [f"{tmp_path / 'for-scaled.gguf'}:0.25"])
    assert error(twice, half) < 2e-3


CONVERTER = """
import runpy, sys
root = sys.argv.pop(1)
sys.path[:0] = [root, root + "/gguf-py"]
runpy.run_path(root + "/convert_lora_to_gguf.py", run_name="__main__")
"""


@pytest.mark.slow
def test_the_adapter_for_an_unscaled_file_is_that_of_llama_cpps_converter(tmp_path: Path, pristine_tree: Path) -> None:
    model = write_random_model(tmp_path / "model", "llama3")
    adapter = adapter_for(tmp_path / "adapter", model)
    export(model, tmp_path / "f16.gguf", "f16", verify=False)
    rewrite_adapter(str(adapter), tmp_path / "f16.gguf", tmp_path / "ours.gguf")
    root = pristine_tree / "vendor/llama.cpp"
    arguments = "--base", model, "--outfile", tmp_path / "theirs.gguf", adapter
    command = [sys.executable, "-c", CONVERTER, *map(str, (root, *arguments))]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    ours, theirs = GGUFFile(tmp_path / "ours.gguf"), GGUFFile(tmp_path / "theirs.gguf")
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, info in ours.tensors.items():
        assert (info.shape, info.type_name) == (theirs.tensors[name].shape, "f32")
        np.testing.assert_array_equal(ours.dequantize(name), theirs.dequantize(name))
    for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert bytes(ours.raw_values[key]) == bytes(theirs.raw_values[key])


@pytest.mark.parametrize("alphas", [{"v_proj": 5}, {"q_proj": 0, "v_proj": 5}, {"q_proj": 0, "v_proj": 0}])
def test_layers_with_scales_of_their_own(tmp_path: Path, alphas: dict[str, int]) -> None:
    """alpha_pattern and rank_pattern: llama.cpp has one alpha, and divides it by each layer's rank."""
    model = write_random_model(tmp_path / "model", "qwen3", dtype=torch.float32)
    modules = [f"model.layers.0.self_attn.{name}_proj" for name in "qv"]
    adapter = write_adapter(tmp_path / "adapter", model, modules, ranks={modules[1]: 2})
    configure(adapter, rank_pattern={"v_proj": 2}, alpha_pattern=alphas)
    export(model, tmp_path / "f32.gguf", "f32", verify=False)
    rewrite_adapter(str(adapter), tmp_path / "f32.gguf", tmp_path / "out.gguf")
    out, tensors = GGUFFile(tmp_path / "out.gguf"), load_file(adapter / "adapter_model.safetensors")
    scales = alphas.get("q_proj", ALPHA) / RANK, alphas["v_proj"] / 2
    for module, name, scale in zip(modules, ("attn_q", "attn_v"), scales, strict=True):
        a, b = (out.dequantize(f"blk.0.{name}.weight.lora_{part}") for part in "ab")
        expected = scale * tensors[f"{PREFIX}{module}.lora_B.weight"] @ tensors[f"{PREFIX}{module}.lora_A.weight"]
        np.testing.assert_allclose(out.kv["adapter.lora.alpha"] / len(a) * b @ a, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_trained_adapters(example_files: ExampleFiles, tmp_path: Path) -> None:
    """As near to the original with its adapter as a file without column scales; the original's adapter is farther."""
    text = (EXAMPLE.parents[1] / "d2q_edge/data/calibration/code.txt").read_text("utf-8")
    middle = len(text) // 2
    (tmp_path / "text.txt").write_text(text[middle:])
    unscaled = tmp_path / "unscaled.gguf"
    convert(EXAMPLE, unscaled, Options(bits=2, calibration_tokens=4096, dsq=False), verify=False)

    def divergence(file: Path, adapter: Path) -> float:
        own, reference = LoadOptions(lora=(str(adapter),)), (str(tmp_path / "original.gguf"),)
        where = file, example_files.f16, str(tmp_path / "text.txt"), 6, 128
        found = evaluate(*where, loading=own, reference_lora=reference).kl_divergence_mean
        assert found is not None
        return found

    for layers in (("q_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")):
        adapter = train_adapter(tmp_path / layers[0], EXAMPLE, layers, text[:middle], steps=30)
        made = {"original": example_files.f16, "unscaled": unscaled, "scaled": example_files.d2q2}
        paths = {name: tmp_path / f"{name}.gguf" for name in made if name != "unscaled"}
        for name, path in paths.items():
            rewrite_adapter(str(adapter), made[name], path, force=True)
        scaled, plain = divergence(example_files.d2q2, paths["scaled"]), divergence(unscaled, paths["original"])
        assert scaled < 1.1 * plain
        assert scaled < 0.97 * divergence(example_files.d2q2, paths["original"])


def test_what_a_conversion_records(example_files: ExampleFiles) -> None:
    """The norms have absorbed just these scales."""
    file, checkpoint = GGUFFile(example_files.d2q2), Checkpoint.open(EXAMPLE)
    scales = read_scales(file)
    for index in range(4):
        for norm, hf, layers in (
            ("attn_norm", "input_layernorm", ("attn_q", "attn_k", "attn_v")),
            ("ffn_norm", "post_attention_layernorm", ("ffn_gate", "ffn_up")),
        ):
            before = checkpoint.tensor(f"model.layers.{index}.{hf}.weight").float().numpy()
            absorbed = file.dequantize(f"blk.{index}.{norm}.weight") / before
            for layer in layers:
                found = scales.columns[f"blk.{index}.{layer}.weight"]
                assert np.abs(np.log2(absorbed / found)).max() <= 1 / 16 + 1e-4
        down, output = (scales.columns[f"blk.{index}.{name}.weight"] for name in ("ffn_down", "attn_output"))
        np.testing.assert_array_equal(scales.rows[f"blk.{index}.ffn_up.weight"], down)
        value = scales.rows[f"blk.{index}.attn_v.weight"].reshape(2, 1, 64)
        np.testing.assert_array_equal(output, value.repeat(2, axis=1).reshape(-1))
    assert not np.array_equal(scales.columns["blk.0.ffn_down.weight"], np.ones(768))
    added = sum(len(file.raw_values[key]) for key in (CODES, USERS))
    assert added < 0.005 * file.size, "of a model this small"


@pytest.fixture
def plain(tmp_path: Path) -> tuple[Path, Path]:
    """A model's file without scales, and an adapter for it."""
    model = write_random_model(tmp_path / "model", "qwen3", num_hidden_layers=1)
    export(model, tmp_path / "f16.gguf", "f16", verify=False)
    return tmp_path / "f16.gguf", adapter_for(tmp_path / "adapter", model)


def test_adapters_that_do_not_fit(plain: tuple[Path, Path], tmp_path: Path) -> None:
    file, adapter = plain
    out = tmp_path / "out.gguf"

    def refuse(source: Path, message: str, model: Path = file) -> None:
        with pytest.raises(D2QError, match=message):
            rewrite_adapter(str(source), model, out)
        assert not out.exists()

    refuse(file, "isn't a LoRA adapter: its general.type is 'model'")
    refuse(tmp_path / "none", "there is no directory")
    other = write_random_model(tmp_path / "other", "llama3", num_hidden_layers=1)
    export(other, tmp_path / "other.gguf", "f16", verify=False)
    rewrite_adapter(str(adapter), file, tmp_path / "made.gguf")
    refuse(tmp_path / "made.gguf", "is an adapter for the architecture 'qwen3'", tmp_path / "other.gguf")
    refuse(adapter, r"the adapter changes blk.0.attn_k.weight by matrices of the shapes", tmp_path / "other.gguf")
    refuse(adapter, "isn't a model; name the GGUF file", tmp_path / "made.gguf")
    deep = write_random_model(tmp_path / "deep", "qwen3")
    refuse(adapter_for(tmp_path / "deep-adapter", deep), r"the adapter changes model.layers.1.* in a way|doesn't exist")
    up = ["model.layers.0.mlp.up_proj"]
    wide = write_adapter(tmp_path / "wide", tmp_path / "model", up, replaced=["lm_head.weight"])
    refuse(wide, "the adapter changes lm_head.weight in a way that llama.cpp's adapters can't express")
    dora = write_adapter(tmp_path / "dora", tmp_path / "model", up, use_dora=True)
    refuse(dora, "merge it into the model by `d2q-edge convert MODEL --adapter DIR`")
    refuse(write_adapter(tmp_path / "tokens", tmp_path / "model", ["model.embed_tokens"]), "changes model.embed_tokens")
    write_scaled(tmp_path / "scaled.gguf", tmp_path / "model")
    rewrite_adapter(str(adapter), tmp_path / "scaled.gguf", tmp_path / "rewritten.gguf")
    assert FIT in GGUFFile(tmp_path / "rewritten.gguf").kv
    refuse(tmp_path / "rewritten.gguf", "was rewritten for a file already")


def test_adapters_for_models_with_experts(tmp_path: Path) -> None:
    """Attention's for a file without column scales; what isn't possible is refused with the way that is."""
    model = write_random_model(tmp_path / "model", "qwen3moe", num_hidden_layers=1)
    layers = {"attention": "self_attn.q_proj", "experts": "mlp.experts.1.gate_proj"}
    adapters = {
        name: str(write_adapter(tmp_path / name, model, [f"model.layers.0.{layer}"])) for name, layer in layers.items()
    }
    scaled, unscaled, out = tmp_path / "scaled.gguf", tmp_path / "unscaled.gguf", tmp_path / "out.gguf"
    export(model, unscaled, "f16", verify=False)
    changed(unscaled, scaled, {"d2q.recipe": '{"dsq": true}'})
    rewrite_adapter(adapters["attention"], unscaled, out)
    with pytest.raises(
        D2QError, match=r"changes model\.layers\.0\.mlp\.experts\.1\.gate_proj.*, which belongs to experts"
    ):
        rewrite_adapter(adapters["experts"], unscaled, out, force=True)
    for adapter in adapters.values():
        with pytest.raises(D2QError, match=r"scaled\.gguf has experts.*: merge the adapter .* or convert .* --no-dsq$"):
            rewrite_adapter(adapter, scaled, out, force=True)


def test_the_command(d2q: Call, plain: tuple[Path, Path], tmp_path: Path) -> None:
    require_runtime()
    file, adapter = plain
    result = d2q("adapter", adapter, tmp_path / "out.gguf", "--for", file)
    size = (tmp_path / "out.gguf").stat().st_size
    assert (result.code, result.out) == (0, f"{tmp_path / 'out.gguf'}: {size:,} bytes\n")
    refused(d2q("adapter", adapter, tmp_path / "out.gguf", "--for", file), "exists already; use --force")
    assert d2q("adapter", adapter, tmp_path / "out.gguf", "--for", file, "--force").code == 0
    refused(d2q("adapter", adapter, file, "--for", file, "--force"), "belongs to what is read and won't be replaced")
    refused(d2q("adapter", adapter, adapter / "adapter_config.json", "--for", file, "--force"), "won't be replaced")
    assert d2q("adapter", adapter, tmp_path / "out.gguf").code == 2
    (tmp_path / "text.txt").write_text("The old man looked out over the sea. " * 20)
    options = ("--text", tmp_path / "text.txt", "--context", "32", "--chunks", "2", "--json")
    same = ("--reference", file, "--reference-lora", tmp_path / "out.gguf")
    found = [d2q("eval", file, *options, *same, *more) for more in ((), ("--lora", tmp_path / "out.gguf"))]
    divergences = [json.loads(each.out)["kl_divergence_mean"] for each in found]
    assert divergences[1] < 1e-4 < 0.1 < divergences[0]
