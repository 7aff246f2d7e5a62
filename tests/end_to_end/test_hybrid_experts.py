"""Families whose blocks differ and some of which have experts: stock files, llama.cpp, quantizing, resuming, tuning."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from d2q_edge.calibration.hidden_states import StreamPair
from d2q_edge.conversion import convert
from d2q_edge.distributed.process_group import SINGLE_PROCESS
from d2q_edge.export.model_file import FILE_TYPES, export, model_tensors, model_tokenizer, write_model
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.formats.gguf_writer import GGUFTensor
from d2q_edge.model.blocks import BlockRunner
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from d2q_edge.model.rotated_checkpoint import RotatedCheckpoint
from d2q_edge.options import Options
from d2q_edge.pipeline.column_scaling import scale_columns
from d2q_edge.pipeline.context import Context
from d2q_edge.pipeline.norm_correction import corrected_norms
from d2q_edge.pipeline.report import Report
from d2q_edge.pipeline.work_dir import WorkDir
from tests.end_to_end.test_family_conversion import divergence, file_weights, log_probabilities
from tests.export.test_family_exports import llama_logits, original_logits
from tests.family_models import write_model as write_random_model
from tests.interruption import interrupted
from tests.pipeline.common import Setup
from tools.whole_model import WholeModel

CPU = torch.device("cpu")
NAMES = ("lfm2moe", "granite-hybrid", "granite-hybrid-moe")
TOKENS = np.random.default_rng(3).integers(0, 4000, (2, 100))
FEW = Options(calibration_tokens=512, context=64)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tests must not change them."""
    directory = tmp_path_factory.mktemp("models")
    return {name: write_random_model(directory / name / "tiny", name) for name in NAMES}


def error(actual: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """Median over the tokens, because one may take another expert: root mean square relative to that of all."""
    return float(np.sqrt(np.median(np.square(actual - expected).mean(1)) / np.square(expected).mean()))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_file_is_the_stock_converters(
    models: dict[str, Path], stock_convert: Callable[[Path, str, str], Path], tmp_path: Path, name: str
) -> None:
    export(models[name], tmp_path / "ours.gguf", "f16")
    assert (tmp_path / "ours.gguf").read_bytes() == stock_convert(models[name], "f16", "qwen2").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    export(models[name], tmp_path / "out.gguf", "f32")
    tokens = TOKENS.flatten().astype(np.int32)
    assert error(llama_logits(tmp_path / "out.gguf", tokens), original_logits(models[name], tokens)) < 0.01


@pytest.mark.parametrize("name", NAMES)
def test_norm_biases_are_added_to_the_norms_outputs(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    checkpoint = Checkpoint.open(models[name])
    family = family_for(checkpoint.config)
    rng = np.random.default_rng(1)
    norms = [
        f"{family.block_prefix(index)}{group.norm}"
        for index in range(family.num_layers)
        for group in family.block_groups(index)
        if group.norm is not None
    ]
    assert len(norms) == 2 * family.num_layers
    biases = {norm: rng.standard_normal(64).astype(np.float32) * 0.3 for norm in (*norms, family.final_norm)}
    extra = [
        GGUFTensor(family.gguf_name(f"{norm}.bias"), (64,), "f32", partial(np.asarray, bias))
        for norm, bias in biases.items()
    ]
    path, tokens = tmp_path / "out.gguf", TOKENS[0, :40].astype(np.int32)
    tensors = [*model_tensors(checkpoint, family, "f32"), *extra]
    write_model(path, checkpoint, family, model_tokenizer(checkpoint, family), tensors, file_type=FILE_TYPES["f32"])
    actual = llama_logits(path, tokens)
    assert error(actual, original_logits(models[name], tokens, biases)) < 0.004
    for norm in biases:
        fewer = {other: bias for other, bias in biases.items() if other != norm}
        assert error(actual, original_logits(models[name], tokens, fewer)) > 0.01


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_blocks_and_column_scales(models: dict[str, Path], name: str) -> None:
    """Sublayers are the block, blocks are the model, and scaled columns change none of them."""
    checkpoint, tokens = Checkpoint.open(models[name]), torch.from_numpy(TOKENS)
    runner = BlockRunner(checkpoint, family_for(checkpoint.config), CPU)
    context = Context(
        runner,
        StreamPair(runner, TOKENS, batch_tokens=4096, place=CPU, processes=SINGLE_PROCESS, dtype=torch.float32),
        SINGLE_PROCESS,
        Report(CPU),
    )
    hidden = runner.embed(tokens)
    for index in range(runner.family.num_layers):
        block, original = runner.load(index), runner.load(index)
        residual = hidden
        for sublayer in runner.family.block_sublayers(index):
            residual = runner.sublayer_forward(block, sublayer, residual)
        torch.testing.assert_close(residual, runner.forward(block, hidden), rtol=1e-5, atol=1e-5)
        changed = scale_columns(context, index, block)
        scaled = runner.forward(block, hidden)
        assert float((scaled - residual).norm() / residual.norm()) < 1e-5
        for group in runner.family.block_groups(index):
            assert changed.column_scales[group.linears[0]].std() > 0.02
            for linear in group.linears:
                before, after = (part.get_submodule(linear).get_parameter("weight") for part in (original, block))
                assert float((after / before - 1).abs().median()) > 0.01
        context.streams.advance(index, original, original)
        hidden = residual
    model = AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float32).eval()
    expected = model.model(tokens, use_cache=False).last_hidden_state
    torch.testing.assert_close(runner.final_norm()(hidden), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_rotation_is_exact(models: dict[str, Path], name: str) -> None:
    checkpoint = Checkpoint.open(models[name])
    rotated = RotatedCheckpoint(checkpoint, seed=0)
    found = [
        log_probabilities(WholeModel(each, family_for(each.config), {}, CPU), TOKENS) for each in (checkpoint, rotated)
    ]
    assert divergence(*found) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [2, 3])
def test_file_computes_what_torch_does(models: dict[str, Path], tmp_path: Path, name: str, bits: int) -> None:
    result = convert(models[name], tmp_path / "out.gguf", Options(bits=bits, calibration_tokens=1280, context=128))
    checkpoint = Checkpoint.open(models[name])
    family = family_for(checkpoint.config)
    weights = file_weights(tmp_path / "out.gguf", family)
    assert weights.keys() - family.tensor_shapes().keys() == {f"{n}.bias" for n in corrected_norms(family, Options())}
    assert family.tensor_shapes().keys() <= weights.keys()
    assert f"d2q{bits}_64" in {info.type_name for info in GGUFFile(tmp_path / "out.gguf").tensors.values()}
    assert result.types.linear_bits_per_weight == bits + 0.5
    original = log_probabilities(WholeModel(checkpoint, family, {}, CPU), TOKENS)
    expected = log_probabilities(WholeModel(checkpoint, family, weights, CPU), TOKENS)
    for window, wanted, first in zip(TOKENS, expected, original, strict=True):
        found = torch.from_numpy(llama_logits(tmp_path / "out.gguf", window.astype(np.int32))).log_softmax(-1)
        lost, off = ((wanted.exp() * (wanted - other)).sum(-1) for other in (first, found))
        # llama.cpp rounds activations to 8 bits, for which a token may take another expert.
        assert lost.median() > 0.01
        assert off.median() < 0.01 * lost.median()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_resumed_file_is_the_same(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    convert(models[name], tmp_path / "whole.gguf", FEW)
    for finished in (1, 3):
        with interrupted(WorkDir, "write_block", finished):
            convert(models[name], tmp_path / "resumed.gguf", FEW)
    convert(models[name], tmp_path / "resumed.gguf", FEW)
    assert (tmp_path / "resumed.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_tuned_blocks_are_nearer(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    setup, work = Setup(models[name]), WorkDir(tmp_path / "out.gguf", {})
    # Random weights, which good rounding leaves little to tune of.
    options = Options(guidance=False, dac=False, descent_rounds=0, alpha=0)
    setup.run(work, options, refine_blocks=True, batch_tokens=80)
    for index in range(setup.family.num_layers):
        error, less = work.read_block(index).metrics.output_errors
        assert less < error
