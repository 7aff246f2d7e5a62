"""What a conversion measured while it went along: errors of layers, column scales, mean shifts, seconds of phases.

Knows how to take time on any device, and which of it is kept with a block for the case that the conversion is
interrupted. Does not know what is being measured.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from d2q_edge.pipeline.validation import Validation
from d2q_edge.quantize.dac import MeanShiftStats

QUANTILES = {"minimum": 0.0, "p05": 0.05, "median": 0.5, "p95": 0.95, "maximum": 1.0}
"""What a report tells of column scales."""
PER_NAME = ("layer_errors", "column_scales", "norm_shifts")
"""Fields that are maps from names, and are kept with the blocks."""


@dataclass
class Report:
    """What a run measured.

    Attributes:
        device: whose work is waited for when time is taken.
        layer_errors: weight name to the squared error of the layer's output relative to the output itself, on the
            calibration tokens.
        column_scales: name of a linear group's first layer, or the head, to QUANTILES of the column scales.
        norm_shifts: name of a norm to what is known about its mean shift (MeanShiftStats, as plain values).
        validation: distance of the two streams behind the last block; None without held-back windows.
        seconds: phase to seconds, of this run.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    layer_errors: dict[str, float] = field(default_factory=dict)
    column_scales: dict[str, dict[str, float]] = field(default_factory=dict)
    norm_shifts: dict[str, dict[str, Any]] = field(default_factory=dict)
    validation: Validation | None = None
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time spent in a with block to a phase."""
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[phase] += time.perf_counter() - start

    def add_scales(self, name: str, scales: torch.Tensor) -> None:
        """Column scales, [columns], of a linear group."""
        positions = torch.tensor(list(QUANTILES.values()))
        found = torch.quantile(scales.detach().float().cpu(), positions)
        self.column_scales[name] = dict(zip(QUANTILES, found.tolist(), strict=True))

    def add_shift(self, name: str, facts: MeanShiftStats) -> None:
        """What is known about a norm's mean shift."""
        self.norm_shifts[name] = asdict(facts)

    def kept(self, *prefixes: str) -> dict[str, Any]:
        """What was measured of the names that begin with one of `prefixes`, as plain values; see `recall`."""
        return {
            field: {name: value for name, value in getattr(self, field).items() if name.startswith(prefixes)}
            for field in PER_NAME
        }

    def recall(self, kept: Mapping[str, Any]) -> None:
        """Take over what an earlier run kept."""
        for each in PER_NAME:
            getattr(self, each).update(kept.get(each, {}))

    def to_json(self) -> dict[str, Any]:
        """Plain values for json.dump."""
        return {
            **{each: getattr(self, each) for each in PER_NAME},
            "validation": asdict(self.validation) if self.validation else None,
            "seconds": dict(self.seconds),
        }

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
