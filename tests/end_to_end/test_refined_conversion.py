"""Conversions with --refine: the norms that the file has, and what is done again after an interruption."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from d2q_edge import conversion
from d2q_edge.conversion import Conversion, convert, plan
from d2q_edge.errors import D2QError
from d2q_edge.formats import tensor_types
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.formats.quantized_block import QuantizedBlock
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from d2q_edge.options import Options
from d2q_edge.pipeline import block_refinement, refinement
from d2q_edge.pipeline.output import Output
from d2q_edge.pipeline.work_dir import WorkDir
from d2q_edge.quantize.refine import Schedule
from tests.checkpoints import write_checkpoint
from tests.interruption import interrupted

CPU = torch.device("cpu")
OPTIONS = Options(calibration_tokens=256, context=32, refine=True, refine_scope="model")
# Random weights, which good rounding leaves little to tune of.
BLOCKS = replace(OPTIONS, refine_scope="blocks", calibration_tokens=2048, descent_rounds=0, guidance=False)
PASSES = 6
STEPS = 3
"""Of a pass: 64 windows, of which two are for validation, in batches of 16."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def large_steps() -> Iterator[None]:
    """Let codes change in a few steps."""
    with pytest.MonkeyPatch.context() as patch:
        schedule = Schedule(passes=PASSES, code_rate=0.4, code_travel=100.0)
        patch.setattr(conversion, "refine", partial(refinement.refine, schedule=schedule))
        patch.setattr(block_refinement, "SCHEDULE", Schedule(passes=4, batch=4, scale_rate=2e-3, code_rate=0.5))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("refined") / "model"
    write_checkpoint(directory, "qwen2", hidden_size=64, intermediate_size=128)
    return directory


@pytest.fixture(scope="module")
def whole(model: Path) -> Path:
    """The file of an undisturbed conversion."""
    path = model.parent / "whole.gguf"
    with counted_steps() as steps:
        result = convert(model, path, OPTIONS)
    assert steps == [PASSES * STEPS]
    assert result.refinement is not None
    assert result.refinement.scope == "model"
    assert result.refinement.after <= result.refinement.before
    return path


@contextmanager
def counted_steps(*, stop_before: int | None = None) -> Iterator[list[int]]:
    """Count the whole model's steps in the with block; interrupt it before that step, counted from 1."""
    count, prepare = [0], refinement._Divergence.prepare

    def step(objective: refinement._Divergence, items: Sequence[int]) -> None:
        if count[0] + 1 == stop_before:
            raise KeyboardInterrupt
        count[0] += 1
        prepare(objective, items)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refinement._Divergence, "prepare", step)
        yield count


def stop_before(step: int, model: Path, output: Path) -> None:
    """Convert, and interrupt the refinement before that step of this run."""
    with counted_steps(stop_before=step), pytest.raises(KeyboardInterrupt):
        convert(model, output, OPTIONS)


def finish(model: Path, output: Path) -> tuple[Conversion, int]:
    """Finish a conversion; returns its result, and the number of steps that it took."""
    with counted_steps() as steps:
        result = convert(model, output, OPTIONS)
    assert not output.with_name(f"{output.name}.work").exists()
    return result, steps[0]


def test_file_holds_the_refined_blocks(model: Path, whole: Path, tmp_path: Path) -> None:
    """And a bias for every norm that reads the residual stream."""
    output = tmp_path / "out.gguf"
    with interrupted(Output, "write", 0):
        convert(model, output, OPTIONS)
    family, file = family_for(Checkpoint.open(model).config), GGUFFile(whole)
    biases = {"output_norm.bias", *(f"blk.{i}.{norm}_norm.bias" for i in (0, 1) for norm in ("attn", "ffn"))}
    assert {name for name in file.tensors if name.endswith("norm.bias")} == biases
    tuned, moved = 0, 0
    for index, prefix in enumerate((family.block_prefix(0), family.block_prefix(1), "")):
        plain, refined = (
            QuantizedBlock.load(tmp_path / "out.gguf.work" / f"{kind}-{index:04d}.safetensors")
            for kind in ("block", "refined")
        )
        expected = {f"{layer}.weight": weight.take_values(CPU).numpy() for layer, weight in refined.weights.items()}
        expected |= refined.floats | {f"{norm}.bias": bias for norm, bias in refined.norm_biases.items()}
        for name, values in expected.items():
            found = file.dequantize(family.gguf_name(prefix + name))
            assert np.array_equal(found, family.export_rows(prefix + name, values)), name
        for layer, weight in refined.weights.items():
            (*_, codes), (*_, before) = (
                tensor_types.unpack(each.type, each.data) for each in (weight, plain.weights[layer])
            )
            assert not np.array_equal(weight.data, plain.weights[layer].data)
            tuned, moved = tuned + 1, moved + int((codes != before).sum())
    assert tuned == 14
    assert moved > 100
    # Nothing is tuned again, where all of it is done.
    assert finish(model, output)[1] == 0
    assert output.read_bytes() == whole.read_bytes()


def test_interrupted_and_resumed_is_the_same(model: Path, whole: Path, tmp_path: Path) -> None:
    """Before refinement, while its result is saved, and while the file is written."""
    output = tmp_path / "out.gguf"
    stop_before(1, model, output)
    with interrupted(WorkDir, "write_block", 1), counted_steps() as steps:
        convert(model, output, OPTIONS)
    assert steps == [PASSES * STEPS]
    with interrupted(Output, "write", 0), counted_steps() as steps:
        convert(model, output, OPTIONS)
    assert steps == [STEPS], "the last pass, which keeps no state"
    result, repeated = finish(model, output)
    assert (result.refinement, repeated) == (None, 0)
    assert output.read_bytes() == whole.read_bytes()


class TestInTheMiddle:
    """Refinement goes on after the last whole pass."""

    @pytest.mark.parametrize(("stopped", "left"), [(3, 18), (4, 15), (18, 3)])
    def test_same_file(self, model: Path, whole: Path, tmp_path: Path, stopped: int, left: int) -> None:
        output = tmp_path / "out.gguf"
        stop_before(stopped, model, output)
        kept = (tmp_path / "out.gguf.work" / "refining.safetensors").exists()
        assert kept == (left < PASSES * STEPS)
        assert finish(model, output)[1] == left
        assert output.read_bytes() == whole.read_bytes()

    def test_twice(self, model: Path, whole: Path, tmp_path: Path) -> None:
        output = tmp_path / "out.gguf"
        stop_before(5, model, output)
        stop_before(13, model, output)
        assert finish(model, output)[1] == 3
        assert output.read_bytes() == whole.read_bytes()

    def test_without_room_on_the_disk(
        self, model: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        output, real = tmp_path / "out.gguf", shutil.disk_usage
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=1 << 20))
            stop_before(18, model, output)
        assert "refinement starts over if it is interrupted: to go on, it would need 0.0 GiB" in capsys.readouterr().err
        assert not (tmp_path / "out.gguf.work" / "refining.safetensors").exists()
        assert finish(model, output)[1] == PASSES * STEPS
        assert output.read_bytes() == whole.read_bytes()

    def test_damaged(self, model: Path, whole: Path, tmp_path: Path) -> None:
        output = tmp_path / "out.gguf"
        stop_before(7, model, output)
        state = tmp_path / "out.gguf.work" / "refining.safetensors"
        content = bytearray(state.read_bytes())
        content[-1] ^= 1
        state.write_bytes(content)
        with pytest.raises(D2QError, match=r"refining.safetensors is damaged .*; remove it and convert again"):
            convert(model, output, OPTIONS)
        state.unlink()
        assert finish(model, output)[1] == PASSES * STEPS
        assert output.read_bytes() == whole.read_bytes()


def test_blocks_alone(model: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What tuning them makes, said and recorded; the same after an interruption; where the whole model begins."""
    output = tmp_path / "blocks.gguf"
    with counted_steps() as steps:
        result = convert(model, output, BLOCKS)
    assert steps == [0]
    assert result.refinement is not None
    assert result.refinement.scope == "blocks"
    assert result.refinement.after <= result.refinement.before
    assert "refining every block as soon as it is quantized\n" in capsys.readouterr().err
    assert "refinement: mean error of the blocks' outputs on validation text" in result.describe(output)
    recipes = [json.loads(GGUFFile(path).kv["d2q.recipe"]) for path in (output, whole)]
    assert [(recipe["refine"], recipe["refine_scope"]) for recipe in recipes] == [(True, "blocks"), (True, "model")]
    again = tmp_path / "again.gguf"
    with interrupted(WorkDir, "write_block", 1):
        convert(model, again, BLOCKS)
    convert(model, again, BLOCKS)
    assert again.read_bytes() == output.read_bytes()
    assert output.stat().st_size == pytest.approx(whole.stat().st_size, abs=64)


def test_the_scope_that_is_chosen(model: Path, tmp_path: Path) -> None:
    """On a CPU blocks, and another scope is another conversion."""
    job = plan(model, tmp_path / "out.gguf", replace(OPTIONS, refine_scope="auto"))
    assert job.scope == "blocks"
    with pytest.raises(D2QError, match="refine_scope must be one of auto, blocks, model, not 'layers'"):
        convert(model, tmp_path / "out.gguf", replace(OPTIONS, refine_scope="layers"))
