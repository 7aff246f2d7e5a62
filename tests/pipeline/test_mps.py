"""The pipeline on an Apple GPU, as far as that can be tested without one: see tests/fake_mps.py."""

from pathlib import Path
from typing import Any

import pytest
import torch

from d2q_edge.model.blocks import BlockRunner
from d2q_edge.options import Options
from d2q_edge.pipeline.block_loop import quantize_blocks
from d2q_edge.pipeline.sensitivity import measure
from d2q_edge.pipeline.type_plan import rounding_types
from d2q_edge.pipeline.work_dir import WorkDir
from d2q_edge.quantize.cholesky import inverse_cholesky
from d2q_edge.quantize.native import library
from tests.fake_mps import MPS, FakeMps, FakeTensor, Refused, attention, has_kernel
from tests.family_models import write_model
from tests.pipeline.common import EXACT, WINDOWS, Setup, block_files


def test_the_fake_refuses_what_the_real_one_does() -> None:
    with FakeMps() as fake:
        there = torch.ones(3, 4).to(MPS)
        assert isinstance(there, FakeTensor)
        assert there.device.type == "mps"
        assert torch.equal((there * 2 + 1).cpu(), torch.full((3, 4), 3.0))
        there.add_(1)
        assert float(there.sum()) == 24
        assert torch.zeros(2, device=MPS).device.type == "mps"
        for forbidden in (
            lambda: there.double(),
            lambda: torch.zeros(2, dtype=torch.float64, device=MPS),
            lambda: there @ torch.ones(4, 4),
            lambda: torch.geqrf(there),
        ):
            with pytest.raises(Refused):
                forbidden()
    assert {"mul.Tensor", "add.Tensor", "add_.Tensor"} <= fake.seen
    assert has_kernel("mm") and not has_kernel("geqrf")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "bits"), [("qwen3", 2), ("gemma3", 3)])
def test_blocks_are_quantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, bits: int) -> None:
    """Nothing is refused, and as little goes wrong as on the CPU."""
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    setup = Setup(write_model(tmp_path / "model", family, num_hidden_layers=2), bits)
    options, results = Options(), []
    for device in (torch.device("cpu"), MPS):
        work = WorkDir(tmp_path / f"{device.type}.gguf", {})
        with FakeMps() as fake:
            runner = BlockRunner(setup.checkpoint, setup.family, device)
            arguments: dict[str, Any] = {"validation": WINDOWS[:2], **EXACT}
            report = quantize_blocks(runner, setup.types, WINDOWS, work, options, **arguments)
        assert report.validation is not None
        results.append(report.validation.kl_divergence)
        assert block_files(work)
        assert bool(fake.seen) == (device == MPS)
    assert results[1] == pytest.approx(results[0], rel=0.05)


def test_a_hessian_that_float32_cannot_factor() -> None:
    """Float64, which follows, is the CPU's."""
    column = torch.arange(1.0, 41.0)[:, None]
    hessian = column @ column.T
    expected, _ = inverse_cholesky(hessian, 1e-9)
    with FakeMps():
        found, _ = inverse_cholesky(hessian.to(MPS), 1e-9)
        assert isinstance(found, FakeTensor)
        assert torch.equal(found.cpu(), expected)


@pytest.mark.slow
def test_sensitivity_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    setup = Setup(write_model(tmp_path / "model", "qwen3"))
    types = rounding_types(setup.family)
    # An Apple GPU rounds in torch.
    monkeypatch.setattr(library, "library", lambda: None)
    expected = measure(setup.runner(), types, WINDOWS[:2])
    with FakeMps():
        found = measure(BlockRunner(setup.checkpoint, setup.family, MPS), types, WINDOWS[:2])
    assert found == pytest.approx(expected, rel=1e-3)
