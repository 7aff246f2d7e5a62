"""What a conversion reports: layer errors, column scales, mean shifts, KL divergence on validation text, seconds."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from d2q_edge.formats.quantized_block import BlockMetrics, QuantizedBlock
from d2q_edge.options import Options
from d2q_edge.pipeline.report import Report
from d2q_edge.pipeline.validation import Validation
from d2q_edge.pipeline.work_dir import WorkDir
from tests.blocks import assert_same_block, finished_blocks, model_tensors
from tests.pipeline.common import EXACT, SMALL, WINDOWS, Make, Setup, StoppedAt

VALIDATION = np.random.default_rng(9).integers(0, 4000, (3, WINDOWS.shape[1]))


@pytest.mark.parametrize("tied", [False, True])
@torch.inference_mode()
def test_validation_is_that_of_whole_models(make_checkpoint: Make, tmp_path: Path, tied: bool) -> None:
    setup = Setup(make_checkpoint("qwen3", **SMALL, tie_word_embeddings=tied))
    work = WorkDir(tmp_path / "out.gguf", {})
    found = setup.run(work, validation=VALIDATION, **EXACT).validation
    assert found is not None
    quantized = model_tensors(work, setup.family, setup.checkpoint)
    # The head has taken over the scales that the final norm has; it isn't quantized here.
    assert ("lm_head.weight" in quantized) == (not tied)
    assert "model.norm.bias" in quantized
    half = WINDOWS.shape[1] // 2
    a, b = (
        torch.log_softmax(
            setup.whole_model(tensors)(torch.from_numpy(VALIDATION)).logits[:, half:].double(), -1
        ).flatten(0, 1)
        for tensors in ({}, quantized)
    )
    expected = (a.exp() * (a - b)).sum(1)
    assert found.tokens == len(expected) == 3 * (WINDOWS.shape[1] - half)
    assert found.kl_divergence == pytest.approx(float(expected.mean()), rel=1e-3)
    assert found.top1_agreement == pytest.approx(float((a.argmax(1) == b.argmax(1)).double().mean()))
    assert float(expected.mean()) > 1e-3


@pytest.mark.slow
@torch.inference_mode()
def test_validation_text_changes_nothing(make_checkpoint: Make, tmp_path: Path) -> None:
    setup = Setup(make_checkpoint("llama", **SMALL))
    blocks = []
    for name, validation in (("with", VALIDATION), ("without", None), ("empty", VALIDATION[:0])):
        work = WorkDir(tmp_path / name, {})
        report = setup.run(work, validation=validation, **EXACT)
        assert (report.validation is None) == (name != "with")
        blocks.append(finished_blocks(work, setup.family))
        assert len(blocks[-1]) == 4
    for other in blocks[1:]:
        for prefix, block in blocks[0].items():
            assert_same_block(other[prefix], block)


@pytest.mark.slow
@torch.inference_mode()
def test_report_of_an_interrupted_run_is_complete(make_checkpoint: Make, tmp_path: Path) -> None:
    setup = Setup(make_checkpoint("llama", **SMALL))

    def run(work: WorkDir) -> dict[str, object]:
        return setup.run(work, validation=VALIDATION, **EXACT).to_json()

    whole = run(WorkDir(tmp_path / "whole", {}))
    assert json.loads(json.dumps(whole)) == whole
    layers = setup.family.num_layers
    norms = [f"model.layers.{index}.post_attention_layernorm" for index in range(layers)]
    names = {name: list(value) for name, value in whole.items() if isinstance(value, dict)}
    assert names["norm_shifts"] == [*norms, "model.norm"]
    assert len(names["column_scales"]) == 4 * layers + 1
    assert names["layer_errors"] == setup.family.linear_weights()
    with pytest.raises(KeyboardInterrupt):
        run(StoppedAt(tmp_path / "parts", {}))
    parts = run(WorkDir(tmp_path / "parts", {}))
    # Everything was done by now: only validation is done again.
    again = run(WorkDir(tmp_path / "parts", {}))
    for found in (parts, again):
        for name in ("layer_errors", "column_scales", "norm_shifts", "validation"):
            assert found[name] == whole[name], name
            assert found[name], name


@torch.inference_mode()
def test_metrics_are_those_of_the_blocks(make_checkpoint: Make, tmp_path: Path) -> None:
    setup = Setup(make_checkpoint("qwen2", **SMALL))
    work = WorkDir(tmp_path / "out.gguf", {})
    report = setup.run(work, validation=VALIDATION, **EXACT)
    blocks = finished_blocks(work, setup.family)
    kept = {prefix + name: scales for prefix, block in blocks.items() for name, scales in block.column_scales.items()}
    assert len(kept) == 4 * 3 + 1
    assert report.column_scales.keys() == kept.keys()
    for name, scales in kept.items():
        expected = np.quantile(scales, [0, 0.05, 0.5, 0.95, 1])
        assert list(report.column_scales[name].values()) == pytest.approx(expected, rel=1e-4)
        assert name not in report.norm_shifts
    biases = {prefix + norm for prefix, block in blocks.items() for norm in block.norm_biases}
    assert biases
    assert {name for name, stats in report.norm_shifts.items() if stats["applied"]} == biases


@torch.inference_mode()
def test_without_dsq_and_dac_there_is_nothing_to_report_of_them(make_checkpoint: Make, tmp_path: Path) -> None:
    setup = Setup(make_checkpoint("llama", **SMALL))
    report = setup.run(WorkDir(tmp_path / "out.gguf", {}), Options(dsq=False, dac=False, guidance=False))
    assert (report.column_scales, report.norm_shifts, report.validation) == ({}, {}, None)
    assert set(report.seconds) == {"forward", "statistics", "solve"}


def test_names_become_full_names() -> None:
    report = Report()
    metrics = BlockMetrics({"self_attn.q_proj": 0.25}, {"input_layernorm": {"applied": True}})
    block = QuantizedBlock(column_scales={"mlp.down_proj": np.arange(1, 102, dtype=np.float32)}, metrics=metrics)
    report.add_block("model.layers.3.", block)
    report.add_block("", QuantizedBlock(metrics=BlockMetrics(norm_shifts={"model.norm": {"applied": False}})))
    report.validation = Validation(10, 0.5, 0.1, 0.75)
    report.seconds["solve"] += 2.0
    assert report.to_json() == {
        "layer_errors": {"model.layers.3.self_attn.q_proj.weight": 0.25},
        "column_scales": {
            "model.layers.3.mlp.down_proj": {"minimum": 1, "p05": 6, "median": 51, "p95": 96, "maximum": 101}
        },
        "norm_shifts": {"model.layers.3.input_layernorm": {"applied": True}, "model.norm": {"applied": False}},
        "validation": {"tokens": 10, "kl_divergence": 0.5, "kl_divergence_stderr": 0.1, "top1_agreement": 0.75},
        "seconds": {"solve": 2.0},
    }
    assert Report().to_json()["validation"] is None


def test_time_of_a_phase_adds_up() -> None:
    report = Report()
    for _ in range(2):
        with report.timed("solve"):
            sum(range(10000))
    first = report.seconds["solve"]
    assert 0 < first < 10
    with report.timed("solve"):
        pass
    assert report.seconds["solve"] > first
