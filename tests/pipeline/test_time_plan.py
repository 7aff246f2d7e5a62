"""The estimate of a conversion's time: counted by hand for one model, and what makes it longer."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from d2q_edge.conversion import convert
from d2q_edge.model.families import Family
from d2q_edge.options import Options
from d2q_edge.pipeline import time_plan
from d2q_edge.pipeline.guidance import OUTPUT_TOKENS
from d2q_edge.pipeline.time_plan import Speed, TimePlan, estimate, measure_speed
from d2q_edge.pipeline.type_plan import plan_types
from tests.checkpoints import EXAMPLE
from tests.pipeline.test_memory import family

PLAIN = Options(dsq=False, dac=False, guidance=False)
SPEED = Speed(1e9, {"d2q2": 1e-6, "d2q3": 1e-6})
TOKENS = 1000


def estimated(of: Family, options: Options = PLAIN, speed: Speed = SPEED, tokens: int = TOKENS) -> TimePlan:
    return estimate(of, plan_types(of, options.bits), tokens, 100, options, speed)


def test_work_is_counted() -> None:
    """One block, 512 wide: every product by hand."""
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1000}
    small = family("llama-3.2-1b", hidden_size=512, intermediate_size=1024, num_hidden_layers=1, **sizes)
    attention = 512 * 512 * 2 + 2 * 512 * 128 + time_plan.ATTENTION * 100 * 512
    mlp = 3 * 512 * 1024
    phases = estimated(small).phases
    assert phases["forward"] == pytest.approx(2 * (attention + mlp) * TOKENS * time_plan.FORWARD / 1e9)
    moments = 1.5 * TOKENS * (3 * 512**2 + 1024**2)
    assert phases["statistics"] == pytest.approx(moments * time_plan.STATISTICS / 1e9)
    shapes = [(768, 512), (512, 512), (2048, 512), (512, 1024)]
    products = sum(time_plan.ROW_PRODUCTS * r * c**2 + time_plan.COLUMN_PRODUCTS * c**3 for r, c in shapes)
    assert phases["solve"] == pytest.approx(products / 1e9 + 1e-6 * sum(r * c for r, c in shapes))
    corrected = estimated(small, replace(PLAIN, dac=True)).phases["forward"] - phases["forward"]
    assert corrected == pytest.approx(attention * TOKENS * time_plan.FORWARD / 1e9), "the attention once more"
    guided = estimated(small, replace(PLAIN, guidance=True)).phases["gradients"]
    head = 3 * TOKENS * 512 * 1000
    halves = (2 * 384**2 + 512**2 + 4 * 512**2 + 512**2) / 2 * min(TOKENS, OUTPUT_TOKENS)
    assert guided == pytest.approx((4 * (attention + mlp) * TOKENS + halves + head) * time_plan.FORWARD / 1e9)


def test_what_makes_it_longer() -> None:
    small, large = family("llama-3.2-1b"), family("qwen3-8b")
    before = estimated(small)
    assert estimated(large).seconds > 4 * before.seconds
    assert estimated(small, tokens=2 * TOKENS).phases["forward"] == pytest.approx(2 * before.phases["forward"])
    half = estimated(small, speed=Speed(5e8, {"d2q2": 2e-6}))
    for phase in ("forward", "statistics", "solve"):
        assert half.phases[phase] == pytest.approx(2 * before.phases[phase])


def test_experts_see_their_own_tokens() -> None:
    experts = family("qwen3-30b-a3b", num_hidden_layers=1)
    dense = family("qwen3-30b-a3b", num_hidden_layers=1, num_experts_per_tok=128)
    tokens = 128 * 8192
    few, all_of_them = estimated(experts, tokens=tokens), estimated(dense, tokens=tokens)
    assert few.phases["solve"] == pytest.approx(all_of_them.phases["solve"])
    assert few.phases["statistics"] < all_of_them.phases["statistics"] / 5
    assert few.phases["forward"] < all_of_them.phases["forward"] / 5


def test_a_machine_is_measured() -> None:
    speed = measure_speed(["d2q2_64"], torch.device("cpu"), Options())
    assert 1e8 < speed.products < 1e13
    assert 1e-9 < speed.search["d2q2_64"] < 1e-3


def test_a_dry_run_says_it(tmp_path: Path) -> None:
    planned = convert(EXAMPLE, tmp_path / "out.gguf", Options(calibration_tokens=4096), dry_run=True)
    text = planned.describe(tmp_path / "out.gguf")
    assert "\nneeds at most " in text
    assert "\ntakes about " in text
    assert "on this machine, if nothing else runs: gradients " in text
    rounded = convert(EXAMPLE, tmp_path / "out.gguf", Options(calibrate=False), dry_run=True)
    assert "takes about" not in rounded.describe(tmp_path / "out.gguf")
