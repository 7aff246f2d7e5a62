"""Weights of calibration tokens: their form, what they do to H, resuming, several processes."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from d2q_edge.calibration import output_gradients
from d2q_edge.distributed.process_group import SINGLE_PROCESS
from d2q_edge.options import Options
from d2q_edge.pipeline import block_loop, column_scaling, guidance, memory
from d2q_edge.pipeline.guidance import CLIP, POWER, Guidance, measure_guidance
from d2q_edge.pipeline.work_dir import WorkDir
from d2q_edge.quantize.statistics import InputStatistics
from tests.pipeline.common import SMALL, WINDOWS, Make, Setup, StoppedAt

GUIDED = Options()


def test_weights() -> None:
    a, b = torch.tensor([1.0, 2, 3, 2]), torch.tensor([10.0, 0, 0, 30])
    squares = {"x.a": {0: a[:3], 2: a[3:]}, "x.b": {0: b[:3], 2: b[3:]}}
    found = Guidance(squares, SINGLE_PROCESS).weights("x.", ("a", "b"))
    expected = ((a / 2 + b / 10) / 2) ** POWER
    assert list(found) == [0, 2]
    torch.testing.assert_close(torch.cat(list(found.values())), expected / expected.mean())


def test_outliers_are_clipped() -> None:
    squares = torch.ones(1000)
    squares[7] = 1e6
    (found,) = Guidance({"a": {0: squares}}, SINGLE_PROCESS).weights("", ("a",)).values()
    assert found.mean() == pytest.approx(1)
    assert found[7] / found[8] == pytest.approx((CLIP / (1 / squares.mean())) ** POWER)


def test_without_gradients_all_count_alike() -> None:
    (found,) = Guidance({"a": {0: torch.zeros(4)}}, SINGLE_PROCESS).weights("", ("a",)).values()
    assert found.tolist() == [1, 1, 1, 1]


def test_weighted_statistics() -> None:
    x, original = torch.randn(2, 50, 8).double()
    weights = torch.rand(50).double()
    statistics = InputStatistics(8)
    statistics.add_batch(x.float(), original.float(), weights.float())
    hessian = 2 / 50 * sum(w * torch.outer(row, row) for w, row in zip(weights, x, strict=True))
    shift = 2 / 50 * sum(w * torch.outer(o - row, row) for w, o, row in zip(weights, original, x, strict=True))
    torch.testing.assert_close(statistics.hessian.double(), hessian, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(statistics.dXXT.double(), shift, rtol=1e-4, atol=1e-5)


def assert_same(one: WorkDir, other: WorkDir) -> None:
    """Compare the output Hessians that two work directories keep."""
    for path in other.path.glob("outputs-*"):
        assert (one.path / path.name).read_bytes() == path.read_bytes()


class TestMeasuring:
    @pytest.fixture
    def setup(self, make_checkpoint: Make) -> Setup:
        return Setup(make_checkpoint("llama", **SMALL))

    def measure(self, setup: Setup, work: WorkDir, most: int = 2**30) -> Guidance:
        with torch.inference_mode():
            return measure_guidance(setup.runner(), WINDOWS, 80, most, work, SINGLE_PROCESS)

    def test_in_passes(self, setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What fits into memory at a time doesn't change the weights; finished passes aren't measured again."""
        work = WorkDir(tmp_path / "a", {})
        whole = self.measure(setup, work).weights("model.layers.1.", ("mlp.gate_proj", "mlp.up_proj"))
        assert [len(part) for part in whole.values()] == [80] * 6
        pieces = WorkDir(tmp_path / "b", {})
        few = output_gradients.kept_bytes(setup.family, 160)
        parted = self.measure(setup, pieces, few).weights("model.layers.1.", ("mlp.gate_proj", "mlp.up_proj"))
        assert len(list(pieces.path.glob("gradients-*"))) == 3
        for index in range(setup.family.num_layers):
            (once, every), (added, batches) = work.read_outputs(0, index), pieces.read_outputs(0, index)
            assert every == batches == list(range(6))
            assert once.keys() == added.keys()
            assert len(once) == 4
            assert all(np.array_equal(added[name], array) for name, array in once.items())
        assert all(torch.equal(whole[batch], parted[batch]) for batch in range(6))
        monkeypatch.setattr(guidance, "output_gradients", None)
        again = self.measure(setup, pieces, few).weights("model.layers.1.", ("mlp.gate_proj", "mlp.up_proj"))
        assert all(torch.equal(whole[batch], again[batch]) for batch in range(6))
        with pytest.raises(TypeError):
            self.measure(setup, pieces)  # other passes
        monkeypatch.undo()
        pieces.write_outputs(0, 1, [0, 1], {})  # as a run with other passes has left it
        self.measure(setup, pieces)
        assert_same(pieces, work)

    def test_output_hessians(self, setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Few batches are enough, evenly spread; rows that absorb column scales have smaller gradients."""
        monkeypatch.setattr(guidance, "OUTPUT_TOKENS", 240)
        work = WorkDir(tmp_path / "a", {})
        found = self.measure(setup, work)
        assert work.read_outputs(0, 1)[1] == [0, 2, 4]
        context = SimpleNamespace(guidance=found, family=setup.family, device=torch.device("cpu"))
        gate, down = (setup.family.block_groups(1)[number] for number in (2, 3))
        scales = np.linspace(0.5, 2, 256, dtype=np.float32)
        plain, scaled = (
            column_scaling.output_hessians(context, 1, known)[gate.linears[0]]  # type: ignore[arg-type]
            for known in ({}, {down.linears[0]: scales})
        )
        assert gate.linears == ("mlp.gate_proj", "mlp.up_proj")
        factors = np.r_[np.ones(256), scales]
        np.testing.assert_allclose(
            scaled.pieces[0].numpy(), plain.pieces[0].numpy() / np.outer(factors, factors), rtol=1e-5
        )
        context.guidance = None
        assert column_scaling.output_hessians(context, 1, {}) == {}  # type: ignore[arg-type]

    def test_it_decides_the_result(self, setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Both the weights of the tokens and the output Hessians do."""
        results = {}
        for name, options in (("guided", GUIDED), ("plain", Options(guidance=False)), ("weights alone", GUIDED)):
            if name == "weights alone":
                monkeypatch.setattr(block_loop, "output_hessians", lambda *_: {})
            work = WorkDir(tmp_path / name, {})
            setup.run(work, options)
            assert bool(list(work.path.glob("gradients-*"))) == options.guidance
            results[name] = setup.tensors(work)
        layer = "model.layers.2.mlp.down_proj.weight"
        assert not torch.equal(results["guided"][layer], results["plain"][layer])
        assert not torch.equal(results["guided"][layer], results["weights alone"][layer])
        assert not torch.equal(results["plain"][layer], results["weights alone"][layer])

    def test_resumed(self, setup: Setup, tmp_path: Path) -> None:
        whole, parted = WorkDir(tmp_path / "whole", {}), StoppedAt(tmp_path / "parted", {})
        setup.run(whole, GUIDED)
        with pytest.raises(KeyboardInterrupt):
            setup.run(parted, GUIDED)
        setup.run(WorkDir(tmp_path / "parted", {}), GUIDED)
        expected, found = setup.tensors(whole), setup.tensors(parted)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_experts(make_checkpoint: Make, tmp_path: Path) -> None:
    setup = Setup(make_checkpoint("qwen3moe"))
    for name, options in (("guided", GUIDED), ("plain", Options(guidance=False))):
        setup.run(WorkDir(tmp_path / name, {}), options)
    guided, plain = (setup.tensors(WorkDir(tmp_path / name, {})) for name in ("guided", "plain"))
    layer = "model.layers.1.mlp.experts.3.down_proj.weight"
    assert not torch.equal(guided[layer], plain[layer])


def test_memory_is_planned(tmp_path: Path) -> None:
    from tests.pipeline.test_memory import CPU, family

    of = family("llama-3.2-1b")
    plans = [
        memory.plan_memory(of, 65536, 4096, CPU, tmp_path / "o.gguf", 0, 2**40, guidance=guided)
        for guided in (False, True)
    ]
    assert plans[0].gradients == 0
    assert plans[1].gradients == memory.GRADIENT_STATES
    moments = sum(size**2 for rows in (3072, 2048, 16384, 2048) for size in [512] * (rows // 512))
    assert plans[1].disk - plans[0].disk == 4 * (65536 * 7 + moments) * of.num_layers
    assert plans[1].host >= plans[0].host
    assert np.isfinite(plans[1].host)
