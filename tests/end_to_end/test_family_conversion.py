"""Every family through the quantizing path: blocks, column scales, rotation, the file in llama.cpp, refinement."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM

from d2q_edge.calibration.hidden_states import StreamPair
from d2q_edge.conversion import convert, execute, plan
from d2q_edge.distributed.process_group import SINGLE_PROCESS
from d2q_edge.errors import D2QError
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.model.blocks import BlockRunner
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import Family, family_for
from d2q_edge.model.families.delta_net import GatedDeltaNet
from d2q_edge.model.families.llama import Llama
from d2q_edge.model.rotated_checkpoint import RotatedCheckpoint
from d2q_edge.options import Options
from d2q_edge.pipeline.column_scaling import scale_columns
from d2q_edge.pipeline.context import Context
from d2q_edge.pipeline.norm_correction import corrected_norms
from d2q_edge.pipeline.planning import draw_windows
from d2q_edge.pipeline.refinement import refinement_tokens
from d2q_edge.pipeline.report import Report
from d2q_edge.pipeline.work_dir import WorkDir
from d2q_edge.quantize.refine import EARLY_STOPPING_EVERY
from tests.export.test_family_exports import llama_logits
from tests.family_models import MODELS, write_model
from tests.interruption import interrupted
from tools.whole_model import WholeModel

CPU = torch.device("cpu")
TOKENS = np.random.default_rng(5).integers(0, 4000, (2, 100))
CONVERTED = ("smollm2", "mistral", "smollm3", "gemma3", "phi4-mini")
CONVERTED_AT_BOTH = ("olmo3", "ministral3", "granite", "ernie4_5", "lfm2", "qwen3.5", "gemma4", "gemma4-e")
"""At 2 and at 3 bits."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tests must not change them."""
    directory = tmp_path_factory.mktemp("models")
    return {name: write_model(directory / name / "tiny", name) for name in MODELS}


def runner_for(model: Path) -> BlockRunner:
    checkpoint = Checkpoint.open(model)
    return BlockRunner(checkpoint, family_for(checkpoint.config), CPU)


def log_probabilities(model: WholeModel, tokens: npt.NDArray[np.int64]) -> torch.Tensor:
    with torch.inference_mode():
        return model.log_probabilities(model.states(torch.from_numpy(tokens)))


def divergence(expected: torch.Tensor, actual: torch.Tensor) -> float:
    return float((expected.exp() * (expected - actual)).sum(-1).mean())


def file_weights(path: Path, family: Family) -> dict[str, torch.Tensor]:
    """A file's tensors by their names in the checkpoint, in its order of rows and with its meaning of norms."""
    file = GGUFFile(path)
    names = list(family.tensor_shapes())
    weights = {}
    for name in [*names, *(name.replace("norm.weight", "norm.bias") for name in names if name.endswith("norm.weight"))]:
        if family.gguf_name(name) not in file.tensors:
            continue
        values = np.array(file.dequantize(family.gguf_name(name)), np.float32)
        if expert := re.search(r"\.experts\.(\d+)\.", name):
            values = values[int(expert[1])]
        heads = {"q_proj": family.num_heads, "k_proj": family.num_kv_heads}.get(name.split(".")[-2])
        if isinstance(family, Llama) and heads is not None:
            pairs = values.reshape(heads, family.head_dim // 2, 2, *values.shape[1:])
            values = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
        if family.gguf_arch == "gemma3" and name.endswith("norm.weight"):
            values -= 1
        # A convolution's kernel has one dimension less in the file.
        weights[name] = torch.from_numpy(values).reshape(family.tensor_shapes().get(name, values.shape))
        if name.endswith("mamba.A_log"):
            weights[name] = torch.as_tensor(family.import_values(name, weights[name]))
        if isinstance(family, GatedDeltaNet) and not name.endswith(".bias"):
            # That its order is right is seen from the logits in llama.cpp.
            imported = family.import_values(name, family.import_rows(name, weights[name]))
            weights[name] = family.arranged(name, torch.as_tensor(imported))
    return weights


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_blocks_and_their_sublayers_are_the_model(models: dict[str, Path], name: str) -> None:
    """In a context that is longer than the sliding windows."""
    runner, tokens = runner_for(models[name]), torch.from_numpy(TOKENS)
    model = AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float32).eval()
    expected = model.model(tokens, use_cache=False).last_hidden_state
    hidden = runner.embed(tokens)
    for index in range(runner.family.num_layers):
        block = runner.load(index)
        residual = hidden
        for sublayer in runner.family.block_sublayers(index):
            residual = runner.sublayer_forward(block, sublayer, residual)
        hidden = runner.forward(block, hidden)
        torch.testing.assert_close(residual, hidden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(runner.final_norm()(runner.stream(hidden)), expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_longrope_under_its_first_name(models: dict[str, Path], tmp_path: Path) -> None:
    """Phi-3-mini-128k's first config.json, and those of its fine-tunes, say "su"."""
    old = shutil.copytree(models["phi4-mini"], tmp_path / "old")
    settings = json.loads((old / "config.json").read_text())
    rope = settings.pop("rope_parameters")
    settings |= {"rope_theta": rope["rope_theta"], "partial_rotary_factor": rope["partial_rotary_factor"]}
    settings["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    factors = {f"{kind}_factor": rope[f"{kind}_factor"] for kind in ("long", "short")}
    settings["rope_scaling"] = {"type": "su", **factors}
    (old / "config.json").write_text(json.dumps(settings))
    tokens = torch.from_numpy(TOKENS)
    new_runner, old_runner = runner_for(models["phi4-mini"]), runner_for(old)
    hidden = new_runner.embed(tokens)
    found = [runner.forward(runner.load(0), hidden) for runner in (new_runner, old_runner)]
    assert torch.equal(*found)
    wholes = [WholeModel(runner.checkpoint, runner.family, {}, CPU) for runner in (new_runner, old_runner)]
    assert torch.equal(*(whole.states(tokens) for whole in wholes))
    default = {**settings, "rope_scaling": None}
    (old / "config.json").write_text(json.dumps(default))
    assert not torch.equal(found[0], runner_for(old).forward(old_runner.load(0), hidden)), "the factors matter"


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_column_scales_leave_the_blocks_function_alone(models: dict[str, Path], name: str) -> None:
    runner = runner_for(models[name])
    streams = StreamPair(runner, TOKENS, batch_tokens=4096, place=CPU, processes=SINGLE_PROCESS)
    context = Context(runner, streams, SINGLE_PROCESS, Report(CPU))
    hidden = runner.embed(torch.from_numpy(TOKENS))
    for index in (0, runner.family.num_layers - 1):
        block, original = runner.load(index), runner.load(index)
        expected = runner.forward(block, hidden)
        changed = scale_columns(context, index, block)
        found = runner.forward(block, hidden)
        assert float((found - expected).norm() / expected.norm()) < 3e-6
        for group in runner.family.block_groups(index):
            if group.norm is None and group.absorber is None:
                continue
            assert changed.column_scales[group.linears[0]].std() > 0.02
            for linear in group.linears:
                before, after = (part.get_submodule(linear).get_parameter("weight") for part in (original, block))
                assert float((after / before - 1).abs().median()) > 0.01


@pytest.mark.parametrize("name", MODELS)
def test_rotation_is_exact_or_refused(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    checkpoint = Checkpoint.open(models[name])
    family = family_for(checkpoint.config)
    if not family.can_rotate:
        with pytest.raises(
            D2QError, match=rf"architecture {family.gguf_arch} can't be rotated .*leave out --rotation on$"
        ):
            convert(models[name], tmp_path / "out.gguf", Options(rotation="on"))
        return
    rotated = RotatedCheckpoint(checkpoint, seed=0)
    original = log_probabilities(WholeModel(checkpoint, family, {}, CPU), TOKENS)
    found = log_probabilities(WholeModel(rotated, family_for(rotated.config), {}, CPU), TOKENS)
    assert divergence(original, found) < 1e-5
    name = f"{family.block_prefix(0)}{family.block_linears(0)[0]}.weight"
    assert not torch.allclose(rotated.tensor(name), checkpoint.tensor(name).float(), atol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "bits"), [*((name, 2) for name in (*CONVERTED, *CONVERTED_AT_BOTH)), *((n, 3) for n in CONVERTED_AT_BOTH)]
)
def test_file_computes_what_torch_does(models: dict[str, Path], tmp_path: Path, name: str, bits: int) -> None:
    result = convert(models[name], tmp_path / "out.gguf", Options(bits=bits, calibration_tokens=1280, context=128))
    checkpoint = Checkpoint.open(models[name])
    family = family_for(checkpoint.config)
    weights = file_weights(tmp_path / "out.gguf", family)
    assert weights.keys() >= family.tensor_shapes().keys()
    biased = {f"{norm}.bias" for norm in corrected_norms(family, Options())}
    assert weights.keys() - family.tensor_shapes().keys() == biased
    kinds = {info.type_name for info in GGUFFile(tmp_path / "out.gguf").tensors.values()}
    assert f"d2q{bits}_64" in kinds
    # 256 divides the width of o in Gemma 4's layers with full attention.
    shapes = [family.tensor_shapes()[each] for each in family.linear_weights()]
    stored = sum(rows * columns * (bits + (0.5 if columns % 256 else 0.3125)) for rows, columns in shapes)
    assert result.types.linear_bits_per_weight == stored / sum(rows * columns for rows, columns in shapes)
    original = log_probabilities(WholeModel(checkpoint, family, {}, CPU), TOKENS)
    dequantized = log_probabilities(WholeModel(checkpoint, family, weights, CPU), TOKENS)
    lost = divergence(original, dequantized)
    assert lost > 0.01
    for window, expected in zip(TOKENS, dequantized, strict=True):
        found = torch.from_numpy(llama_logits(tmp_path / "out.gguf", window.astype(np.int32))).log_softmax(-1)
        # llama.cpp rounds activations to 8 bits.
        assert divergence(expected, found) < 0.01 * lost
        following = torch.from_numpy(window[1:, None])
        nats = [-float(each[:-1].gather(-1, following).mean()) for each in (expected, found)]
        assert nats[1] == pytest.approx(nats[0], rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVERTED_AT_BOTH)
def test_resumed_file_is_the_same(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    options = Options(calibration_tokens=512, context=64)
    convert(models[name], tmp_path / "whole.gguf", options)
    with interrupted(WorkDir, "write_block", 1):
        convert(models[name], tmp_path / "resumed.gguf", options)
    # The first block is there, all others and what follows them are not.
    with interrupted(WorkDir, "write_block", family_for(Checkpoint.open(models[name]).config).num_layers - 1):
        convert(models[name], tmp_path / "resumed.gguf", options)
    convert(models[name], tmp_path / "resumed.gguf", options)
    assert (tmp_path / "resumed.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "phi4-mini", "olmo3", "granite", "lfm2", "qwen3.5", "gemma4", "gemma4-e"])
def test_refinement(tmp_path: Path, name: str) -> None:
    """The file is what the refinement ended with: as far from the original, on its validation windows."""
    # Of six layers, since fewer share no keys.
    model = write_model(tmp_path / "tiny", name, num_hidden_layers=6 if name == "gemma4-e" else 2)
    # The tables aren't part of what is refined.
    head = None if family_for(Checkpoint.open(model).config).tied_embeddings else "f32"
    options = Options(
        calibration_tokens=512,
        context=64,
        refine=True,
        refine_scope="model",
        embedding_type="f32",
        head_type=head,
        per_layer_type="f32" if name == "gemma4-e" else None,
    )
    job = plan(model, tmp_path / "out.gguf", options)
    result = execute(job).refinement
    assert result is not None
    # Far more than the file's distance may be off.
    assert result.after < 0.99 * result.before
    assert job.calibration is not None
    tokens = refinement_tokens(options)
    windows = draw_windows(job.checkpoint, job.tokenizer, job.calibration.parts, options, tokens).calibration
    assert windows.shape == (64, 64)
    validation = windows[EARLY_STOPPING_EVERY - 1 :: EARLY_STOPPING_EVERY]
    original, refined = (
        log_probabilities(WholeModel(job.checkpoint, job.family, weights, CPU), validation)
        for weights in ({}, file_weights(tmp_path / "out.gguf", job.family))
    )
    # Of the original, bfloat16 states are compared.
    assert divergence(original, refined) == pytest.approx(result.after, rel=5e-3)
