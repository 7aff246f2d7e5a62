"""What a conversion reports beside the file: column scales, mean shifts, the estimate on held-back text, progress."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2q_edge.calibration import hidden_states
from d2q_edge.pipeline import block_loop, progress
from d2q_edge.pipeline.block_loop import Method, quantize_blocks
from d2q_edge.pipeline.column_scaling import COLUMN_SCALE
from d2q_edge.pipeline.progress import Progress
from d2q_edge.pipeline.report import Report
from d2q_edge.pipeline.work_dir import WorkDir
from tests.pipeline.test_block_loop import SMALL, WINDOWS, Setup, StoppedAt

Make = Callable[..., Path]
VALIDATION_EVERY = np.random.default_rng(9).integers(0, 4000, (3, WINDOWS.shape[1]))


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams that are compared with whole models, and batches small enough that some are held back for the shift."""
    monkeypatch.setattr(hidden_states, "DTYPE", torch.float32)
    monkeypatch.setattr(block_loop, "BATCH_TOKENS", 80)


def run(setup: Setup, work: WorkDir, validation: Any = VALIDATION_EVERY) -> Report:
    return quantize_blocks(setup.runner(), setup.types, WINDOWS, work, Method(), validation=validation)


@pytest.mark.parametrize("tied", [False, True])
@torch.inference_mode()
def test_estimate_is_that_of_whole_models(make_checkpoint: Make, tmp_path: Path, tied: bool) -> None:
    setup = Setup(make_checkpoint("qwen3", **SMALL, tie_word_embeddings=tied))
    work = WorkDir(tmp_path / "out.gguf", {})
    found = run(setup, work).validation
    assert found is not None
    quantized = setup.tensors(work)
    student, teacher = setup.whole_model(quantized), setup.whole_model({})
    if not tied:
        # The head has taken the scales over that the final norm has; it isn't quantized here.
        scales = torch.from_numpy(work.read_block(setup.family.num_layers)[f"lm_head.{COLUMN_SCALE}"])
        student.lm_head.weight.copy_(teacher.lm_head.weight / scales)
    half = WINDOWS.shape[1] // 2
    a, b = (
        torch.log_softmax(model(torch.from_numpy(VALIDATION_EVERY)).logits[:, half:].double(), -1).flatten(0, 1)
        for model in (teacher, student)
    )
    expected = (a.exp() * (a - b)).sum(1)
    assert found.tokens == len(expected) == 3 * (WINDOWS.shape[1] - half)
    assert found.kl_divergence == pytest.approx(float(expected.mean()), rel=1e-3)
    assert found.top1_agreement == pytest.approx(float((a.argmax(1) == b.argmax(1)).double().mean()))
    assert float(expected.mean()) > 1e-3


@torch.inference_mode()
def test_held_back_text_changes_nothing(make_checkpoint: Make, tmp_path: Path) -> None:
    setup = Setup(make_checkpoint("llama", **SMALL))
    files = []
    for name, validation in (("with", VALIDATION_EVERY), ("without", None), ("empty", VALIDATION_EVERY[:0])):
        work = WorkDir(tmp_path / name, {})
        report = run(setup, work, validation)
        assert (report.validation is None) == (name != "with")
        files.append(
            {file.name: work.read_block(index) for index, file in enumerate(sorted(work.path.glob("block-*")))}
        )
    for other in files[1:]:
        assert other.keys() == files[0].keys()
        for file, tensors in files[0].items():
            assert all(np.array_equal(tensors[name], other[file][name]) for name in tensors)


@torch.inference_mode()
def test_report_of_an_interrupted_run_is_complete(make_checkpoint: Make, tmp_path: Path) -> None:
    setup = Setup(make_checkpoint("llama", **SMALL))
    whole = run(setup, WorkDir(tmp_path / "whole", {})).to_json()
    assert json.loads(json.dumps(whole)) == whole
    layers = setup.family.num_layers
    norms = [f"model.layers.{index}.post_attention_layernorm" for index in range(layers)]
    assert list(whole["norm_shifts"]) == [*norms, "model.norm"]
    assert len(whole["column_scales"]) == 4 * layers + 1
    assert len(whole["layer_errors"]) == 7 * layers
    with pytest.raises(KeyboardInterrupt):
        run(setup, StoppedAt(tmp_path / "parts", {}))
    parts = run(setup, WorkDir(tmp_path / "parts", {})).to_json()
    # Everything was done by now: only the estimate is made again.
    again = run(setup, WorkDir(tmp_path / "parts", {})).to_json()
    for found in (parts, again):
        for name in ("layer_errors", "column_scales", "norm_shifts", "validation"):
            assert found[name] == whole[name], name


@torch.inference_mode()
def test_column_scales_are_those_in_the_blocks(make_checkpoint: Make, tmp_path: Path) -> None:
    setup = Setup(make_checkpoint("qwen2", **SMALL))
    work = WorkDir(tmp_path / "out.gguf", {})
    report = run(setup, work)
    kept = {
        name.removesuffix(f".{COLUMN_SCALE}"): data
        for index in range(work.finished)
        for name, data in work.read_block(index).items()
        if name.endswith(COLUMN_SCALE)
    }
    assert report.column_scales.keys() == kept.keys()
    for name, scales in kept.items():
        expected = np.quantile(scales, [0, 0.05, 0.5, 0.95, 1])
        assert list(report.column_scales[name].values()) == pytest.approx(expected, rel=1e-4)
        applied = f"{name}.bias"
        assert applied not in report.norm_shifts
    biases = {
        name.removesuffix(".bias")
        for index in range(work.finished)
        for name in work.read_block(index)
        if name.endswith("norm.bias")
    }
    assert {name for name, facts in report.norm_shifts.items() if facts["applied"]} == biases


class TestProgress:
    class Bar:
        """Remembers what a terminal would show."""

        def __init__(self, **options: Any) -> None:
            self.options, self.n, self.total, self.said = options, 0, options["total"], ""

        def set_postfix_str(self, text: str, refresh: bool) -> None:
            self.said = text

        def update(self, count: int) -> None:
            self.n += count

        def close(self) -> None:
            self.total = -1

    def test_follows_the_weights(self, make_checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(progress, "tqdm", self.Bar)
        setup = Setup(make_checkpoint("llama", **SMALL))
        shapes = setup.family.tensor_shapes()
        sizes = {name: int(np.prod(shapes[name])) for name in setup.types}
        with Progress(setup.family, setup.types, quiet=False) as shown:
            bar: Any = shown._bar
            assert bar.options["disable"] is None
            assert "{remaining}" in bar.options["bar_format"]
            shown.layer("model.layers.0.mlp.down_proj.weight", 0.01234)
            assert bar.said == "block 1/3 mlp.down_proj error 0.0123"
            assert bar.n == sizes["model.layers.0.mlp.down_proj.weight"]
            shown.skip_block(0)
            assert bar.n == sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
            for name in setup.types:
                shown.layer(name, 0.5)
            assert bar.n == sum(sizes.values())
        assert bar.total == -1
        quiet: Any = Progress(setup.family, setup.types, quiet=True)
        assert quiet._bar.options["disable"] is True

    def test_sees_every_layer(self, make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(progress, "tqdm", self.Bar)
        seen: list[tuple[str, float]] = []
        monkeypatch.setattr(Progress, "layer", lambda _, name, error: seen.append((name, error)))
        setup = Setup(make_checkpoint("llama", **SMALL))
        report = run(setup, WorkDir(tmp_path / "out.gguf", {}))
        assert dict(seen) == report.layer_errors
        assert len(seen) == len(setup.types)
