"""Pictures of one conversion, block by block: errors of layers, column scales, mean shifts. From `convert --report`.

Knows the names of a checkpoint's tensors as far as to tell the block and the kind of layer.
"""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from d2q_edge.errors import printable
from d2q_edge.evaluation.report.drawing import Picture
from d2q_edge.evaluation.report.palette import Palette

MARKERS = "osD^vPXd"
LONGEST = 6
"""Digits of a block's number; more can't be one."""
Lines = dict[str, dict[int, float]]
"""Values by block number, of every line."""


def layer_pictures(conversion: Mapping[str, Any]) -> list[Picture]:
    """What can be drawn of a conversion's report; empty without calibration, which measures all of it."""
    errors = by_block(conversion.get("layer_errors") or {})
    scales = conversion.get("column_scales") or {}
    spreads = by_block({name: each["p95"] / each["p05"] for name, each in scales.items() if each["p05"] > 0})
    shifts = conversion.get("norm_shifts") or {}
    sizes = by_block({name: 100 * each["relative_norm"] for name, each in shifts.items()})
    signals = by_block({name: each["signal_to_noise"] for name, each in shifts.items()})
    gains = by_block({name: 100 * each["gain"] for name, each in shifts.items() if each["applied"]})
    found = [
        _lines(
            "Error of each layer",
            "squared error of the output (relative)",
            "Squared error of every layer's output relative to the output, on calibration text, by block.",
            errors,
        ),
        _lines(
            "Column scales",
            "95th over 5th percentile",
            "How unequal the columns of each linear group are that its scales make alike: the 95th percentile of the scales "
            "over the 5th, by block.",
            spreads,
        ),
        _lines(
            "Mean shift at the norms",
            "shift over the norm's output (%)",
            "Size of the mean shift that quantizing causes at each norm's output, in percent of the output, by block.",
            sizes,
        ),
        _lines(
            "Signal-to-noise of the mean shift",
            "shift² over variance",
            "Squared mean shift over the variance of the shift from token to token, by block: only what stands out of "
            "the noise is corrected.",
            signals,
        ),
        _lines(
            "What the norm biases take back",
            "squared error taken back (%)",
            "By how many percent the norm biases reduce the squared error at the norm's output on held-back windows, "
            "by block; norms that are missing have no bias.",
            gains,
        ),
    ]
    return [picture for picture in found if picture is not None]


def by_block(values: Mapping[str, float]) -> Lines:
    """Values by kind of layer and block; of experts and other siblings the mean.

    Args:
        values: by a tensor's or module's full name, for example model.layers.3.mlp.up_proj.weight.
    """
    gathered: dict[str, dict[int, list[float]]] = {}
    for name, value in values.items():
        # What stands in a report may have been written by anybody.
        parts = printable(name).removesuffix(".weight").split(".")
        numbers = [int(part) for part in parts if part.isdecimal() and len(part) <= LONGEST]
        words = [part for part in parts if not part.isdecimal()]
        if not numbers or not words or not math.isfinite(value):
            continue
        kind = f"expert {words[-1]}" if "experts" in words else words[-1]
        gathered.setdefault(kind, {}).setdefault(numbers[0], []).append(value)
    return {
        kind: {block: statistics.fmean(found) for block, found in sorted(blocks.items())}
        for kind, blocks in gathered.items()
    }


def _lines(title: str, label: str, description: str, lines: Lines) -> Picture | None:
    """A line for every kind over the blocks; logarithmic where values differ much."""
    every = [value for line in lines.values() for value in line.values()]
    if not every:
        return None

    def draw(axes: Any, palette: Palette) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

        for index, line in enumerate(lines.values()):
            axes.plot(
                list(line), list(line.values()), color=palette.series[index % len(palette.series)],
                marker=MARKERS[index % len(MARKERS)], markersize=4.5, linewidth=1.4,
            )  # fmt: skip
        if min(every) > 0 and max(every) > 8 * min(every):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(10, (1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.minorticks_off()
        elif min(every) >= 0:
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("block")
        axes.set_ylabel(label)
        if len(lines) > 1:
            legend = axes.figure.legend(
                axes.lines, list(lines), loc="outside lower center", ncols=4, handlelength=1.4, columnspacing=1.0
            )
            for text in legend.get_texts():
                text.set_parse_math(False)

    said = "; ".join(
        f"{kind}: {min(line.values()):.3g} to {max(line.values()):.3g}, median {statistics.median(line.values()):.3g}"
        for kind, line in lines.items()
    )
    return Picture(title, f"{description} {said}.", draw, height=3.4 + 0.2 * math.ceil(len(lines) / 4))
