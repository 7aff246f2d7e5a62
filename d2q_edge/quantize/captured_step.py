"""Replay the kernels of a step on a GPU, which a program in Python launches too slowly where they are small.

CUDA records the kernels of one step as a graph, and launches all of them at once from then on. What a step reads must
be in the same place every time, and nothing in it may wait for the GPU.
"""

from collections.abc import Callable

import torch

EAGER_STEPS = 2
"""Steps before the recording: libraries reserve memory and compile kernels in the first one."""


class CapturedStep:
    """A function without arguments and results that is called many times."""

    def __init__(self, function: Callable[[], None], *, capture: bool) -> None:
        """Take a function; `capture` says that it may be recorded, which needs a CUDA device."""
        self._function, self._calls = function, 0
        self._graph = torch.cuda.CUDAGraph() if capture else None

    def __call__(self) -> None:
        """Call the function, or replay its kernels."""
        self._calls += 1
        if self._graph is None or self._calls <= EAGER_STEPS:
            self._function()
            return
        if self._calls == EAGER_STEPS + 1:
            with torch.cuda.graph(self._graph):
                self._function()
        self._graph.replay()
