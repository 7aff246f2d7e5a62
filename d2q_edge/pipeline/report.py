"""Record what a conversion measures: layer errors, column scales, mean shifts, validation, seconds per phase."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from d2q_edge.formats.quantized_block import QuantizedBlock
from d2q_edge.pipeline.validation import Validation

QUANTILES = {"minimum": 0.0, "p05": 0.05, "median": 0.5, "p95": 0.95, "maximum": 1.0}
"""Of the column scales."""


@dataclass
class Report:
    """What a run measured.

    Attributes:
        device: waited for when time is taken.
        layer_errors: weight name to the squared error of the layer's output relative to the output itself, on the
            calibration tokens.
        column_scales: name of a linear group's first layer, or of the lm_head, to QUANTILES of its column scales.
        norm_shifts: name of a norm to the statistics of its mean shift (quantize/dac.py).
        validation: distance of the quantized from the original model on validation tokens; None without any.
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
        """Add the time that a with block takes to a phase."""
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[phase] += time.perf_counter() - start

    def add_block(self, prefix: str, block: QuantizedBlock) -> None:
        """Add the metrics of a block, whose names become full names by `prefix`."""
        positions = torch.tensor(list(QUANTILES.values()))
        for name, scales in block.column_scales.items():
            quantiles = torch.quantile(torch.from_numpy(scales), positions).tolist()
            self.column_scales[prefix + name] = dict(zip(QUANTILES, quantiles, strict=True))
        self.layer_errors |= {f"{prefix}{name}.weight": e for name, e in block.metrics.layer_errors.items()}
        self.norm_shifts |= {prefix + name: stats for name, stats in block.metrics.norm_shifts.items()}

    def to_json(self) -> dict[str, Any]:
        """Return plain values for json.dump."""
        return {
            "layer_errors": self.layer_errors,
            "column_scales": self.column_scales,
            "norm_shifts": self.norm_shifts,
            "validation": asdict(self.validation) if self.validation else None,
            "seconds": dict(self.seconds),
        }

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
