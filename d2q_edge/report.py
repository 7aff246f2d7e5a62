"""What a conversion measured while it went along: errors of layers, seconds of phases.

Knows how to take time on any device. Does not know what is being measured.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass
class Report:
    """What a run measured.

    Attributes:
        device: whose work is waited for when time is taken.
        layer_errors: weight name to the squared error of the layer's output relative to the output itself, on the
            calibration tokens. Blocks that were finished by an earlier run are absent.
        seconds: phase to seconds.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    layer_errors: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time spent in a with block to a phase."""
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[phase] += time.perf_counter() - start

    def mean_error(self, prefix: str) -> dict[str, str]:
        """For the progress bar: the mean relative error of the layers whose names begin with `prefix`."""
        errors = [error for name, error in self.layer_errors.items() if name.startswith(prefix)]
        return {"error": f"{np.mean(errors):.4f}"} if errors else {}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
