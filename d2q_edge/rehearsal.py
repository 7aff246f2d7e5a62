"""Quantizing a matrix that nobody needs, by a thread, before there is one that somebody does.

A GPU's kernels are compiled when they are used for the first time on a machine, which takes seconds, and they and the
libraries for factorizations are loaded when they are used for the first time in a process. Meanwhile the process looks
through the checkpoint, or imports modules (ahead.py). Knows which steps a real matrix will take (stage_solver.py).
"""

from collections.abc import Iterable
from contextlib import suppress
from threading import Thread

import torch

from d2q_edge.quantize.descent import ROUNDS
from d2q_edge.quantize.dsq import InputEnergy
from d2q_edge.quantize.gptaq import ALPHA, InputStatistics
from d2q_edge.quantize.kernels import has_triton
from d2q_edge.ranks import ALONE
from d2q_edge.stage_solver import StageSolver

COLUMNS = 512
"""Of the matrix."""


class Rehearsal:
    """On one device; on one without kernels of ours nothing happens."""

    def __init__(self, kinds: Iterable[str], rows: Iterable[int], device: torch.device) -> None:
        """Begin, for some tensor types of ours, and matrices of so many rows: kernels are not the same for all."""
        self._kinds, self._rows, self._device = tuple(kinds), tuple(rows), device
        self._thread = Thread(target=self._run)
        if has_triton(device):
            with suppress(RuntimeError):
                self._thread.start()

    def wait(self) -> None:
        """Until it is over."""
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        # What fails here fails again where it is needed, and is reported there. Every thread has a present device.
        with suppress(Exception), torch.cuda.device(self._device):
            rehearse(self._kinds, self._rows, self._device)


@torch.inference_mode()
def rehearse(kinds: Iterable[str], rows: Iterable[int], device: torch.device) -> None:
    """Quantize matrices of some sizes to each of some tensor types of ours."""
    inputs = torch.randn(2 * COLUMNS, COLUMNS, generator=torch.Generator().manual_seed(0)).to(device)
    statistics, energy = InputStatistics(COLUMNS, device), InputEnergy(COLUMNS, device)
    statistics.add_batch(inputs, inputs.round(decimals=1))
    energy.add_batch(inputs)
    energy.conditional()
    solver = StageSolver(device, ALPHA, ROUNDS, ALONE)
    for number in rows:
        for kind in kinds:
            solver.solve({"": inputs[:1].repeat(number, 1)}, kind, statistics)
