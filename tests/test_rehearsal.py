"""The thread that quantizes a matrix that nobody needs."""

import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from d2q_edge import conversion, rehearsal
from d2q_edge.errors import D2QError
from d2q_edge.quantize.dsq import InputEnergy
from d2q_edge.quantize.gptaq import InputStatistics
from d2q_edge.recipe import Options
from d2q_edge.rehearsal import Rehearsal, rehearse
from d2q_edge.stage_solver import StageSolver
from d2q_edge.tensor_types import BY_NAME
from tests.checkpoints import EXAMPLE

CPU = torch.device("cpu")


def test_it_takes_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fails on its way would do no good, and nobody would notice."""
    real, seen = StageSolver.solve, []

    def solve(solver: StageSolver, weights: dict[str, torch.Tensor], kind: str, statistics: InputStatistics) -> Any:
        found = real(solver, weights, kind, statistics)
        ((_, quantized, error),) = found.values()
        assert quantized.shape[1] == rehearsal.COLUMNS
        assert 0 < error < 0.3
        seen.append((kind, len(quantized)))
        return found

    explained, conditional = [], InputEnergy.conditional
    monkeypatch.setattr(InputEnergy, "conditional", lambda energy: explained.append(conditional(energy)))
    monkeypatch.setattr(StageSolver, "solve", solve)
    rehearse(BY_NAME, (3, 40), CPU)
    assert [each.shape for each in explained] == [(rehearsal.COLUMNS,)]
    assert sorted(seen) == [(kind, rows) for kind in sorted(BY_NAME) for rows in (3, 40)]


def test_on_a_device_without_kernels_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "rehearse", lambda *_: pytest.fail("it was called"))
    before = threading.active_count()
    rest = Rehearsal(["d2q2"], [8], CPU)
    assert threading.active_count() == before
    rest.wait()


@pytest.mark.parametrize("fails", [False, True])
def test_a_thread_does_it(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, done = threading.Event(), threading.Event(), []
    devices: list[torch.device] = []

    def slow(*arguments: object) -> None:
        begun.set()
        go_on.wait(60)
        done.append(arguments)
        if fails:
            raise RuntimeError("no compiler")

    monkeypatch.setattr(rehearsal, "rehearse", slow)
    monkeypatch.setattr(rehearsal, "has_triton", lambda _: True)

    def entered(device: torch.device) -> AbstractContextManager[None]:
        devices.append(device)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "device", entered)
    failures: list[object] = []
    monkeypatch.setattr(threading, "excepthook", failures.append)
    here = Rehearsal(["d2q3"], [8, 9], CPU)
    assert begun.wait(60)
    assert not done
    go_on.set()
    here.wait()
    assert done == [(("d2q3",), (8, 9), CPU)]
    assert devices == [CPU]
    assert not failures


def test_a_conversion_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[object] = []

    class Noting(Rehearsal):
        def __init__(self, kinds: Iterable[str], rows: Iterable[int], device: torch.device) -> None:
            order.append((sorted(kinds), sorted(rows), device))

        def wait(self) -> None:
            order.append("wait")

    def stop(*_: object, **__: object) -> None:
        order.append("blocks")
        raise D2QError("enough")

    monkeypatch.setattr(conversion, "Rehearsal", Noting)
    monkeypatch.setattr(conversion, "quantize_blocks", stop)
    with pytest.raises(D2QError, match="enough"):
        conversion.convert(EXAMPLE, tmp_path / "out.gguf", Options(calibration_tokens=512), verify=False)
    assert order == [(["d2q2"], [256, 1536], CPU), "wait", "blocks"]


def test_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(rehearsal, "has_triton", lambda _: True)
    monkeypatch.setattr(threading.Thread, "start", fail)
    Rehearsal(["d2q2"], [8], CPU).wait()
