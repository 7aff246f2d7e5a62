"""A step that is recorded after two calls and replayed from then on; without a GPU, the graph is a fake one."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from d2q_edge.quantize.captured_step import EAGER_STEPS, CapturedStep


class Graph:
    """Counts its replays; while it records, nothing is computed."""

    replays = 0

    def replay(self) -> None:
        self.replays += 1


def test_on_a_cpu_every_call_is_one() -> None:
    calls: list[int] = []
    step = CapturedStep(lambda: calls.append(1), capture=False)
    for _ in range(5):
        step()
    assert len(calls) == 5


def test_recorded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call has its effect once: by the function, or by a replay."""
    graphs, recording, calls = [Graph()], list[Graph](), list[bool]()

    @contextmanager
    def record(graph: Graph) -> Iterator[None]:
        recording.append(graph)
        yield
        recording.clear()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graphs[0])
    monkeypatch.setattr(torch.cuda, "graph", record)
    step = CapturedStep(lambda: calls.append(bool(recording)), capture=True)
    for done in range(1, 7):
        step()
        assert calls.count(False) + graphs[0].replays == done
    assert calls == [False] * EAGER_STEPS + [True]
