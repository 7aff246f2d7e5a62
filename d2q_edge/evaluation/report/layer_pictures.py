"""Draw pictures of one conversion, block by block, from the report of `convert --report`."""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from d2q_edge.errors import printable
from d2q_edge.evaluation.report.drawing import SERIES, Picture
from d2q_edge.evaluation.report.file_pictures import logarithmic

MARKERS = "osD^vPXd"
MAX_DIGITS = 6
"""Longer numbers in a name are no block numbers."""
Lines = dict[str, dict[int, float]]  # values by kind of layer and block number


def layer_pictures(report: Mapping[str, Any]) -> list[Picture]:
    """Plot what a report with all of conversion_report.FIELDS has; without calibration they are empty."""
    shifts = report["norm_shifts"]
    pictures = (
        (
            "Error of each layer",
            "squared error of the output (relative)",
            "Squared error of every layer's output relative to the output, on calibration text, by block.",
            report["layer_errors"],
        ),
        (
            "Column scales",
            "95th over 5th percentile",
            "Spread of the column scales of each linear group: the 95th percentile over the 5th, by block.",
            {name: each["p95"] / each["p05"] for name, each in report["column_scales"].items() if each["p05"] > 0},
        ),
        (
            "Mean shift at the norms",
            "shift over the norm's output (%)",
            "Mean shift that quantization causes at each norm's output, in percent of the output, by block.",
            {name: 100 * each["relative_norm"] for name, each in shifts.items()},
        ),
        (
            "Signal-to-noise of the mean shift",
            "shift² over variance",
            "Squared mean shift over the variance of the shift from token to token, by block; only shifts that stand "
            "out of the noise are corrected.",
            {name: each["signal_to_noise"] for name, each in shifts.items()},
        ),
        (
            "Gain of the norm biases",
            "reduction of the squared error (%)",
            "Reduction of the squared error at the norm's output by the norm biases, in percent, on validation "
            "windows, by block; norms that are missing have no bias.",
            {name: 100 * each["gain"] for name, each in shifts.items() if each["applied"]},
        ),
    )
    found = [_plot(title, label, text, by_block(values)) for title, label, text, values in pictures]
    return [picture for picture in found if picture is not None]


def by_block(values: Mapping[str, float]) -> Lines:
    """Group values of tensors or modules, by name, into lines over the blocks; experts and siblings are averaged."""
    gathered: dict[str, dict[int, list[float]]] = {}
    for name, value in values.items():
        parts = printable(name).removesuffix(".weight").split(".")  # reports are untrusted input
        numbers = [int(part) for part in parts if part.isdecimal() and len(part) <= MAX_DIGITS]
        words = [part for part in parts if not part.isdecimal()]
        if not numbers or not words or not math.isfinite(value):
            continue
        kind = f"expert {words[-1]}" if "experts" in words else words[-1]
        gathered.setdefault(kind, {}).setdefault(numbers[0], []).append(value)
    return {
        kind: {block: statistics.fmean(found) for block, found in sorted(blocks.items())}
        for kind, blocks in gathered.items()
    }


def _plot(title: str, label: str, description: str, lines: Lines) -> Picture | None:
    """Plot a line over the blocks for each kind, on a logarithmic axis if values differ much."""
    every = [value for line in lines.values() for value in line.values()]
    if not every:
        return None

    def draw(axes: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        for index, line in enumerate(lines.values()):
            axes.plot(
                list(line), list(line.values()), color=SERIES[index % len(SERIES)],
                marker=MARKERS[index % len(MARKERS)], markersize=4.5, linewidth=1.4,
            )  # fmt: skip
        if min(every) > 0 and max(every) > 8 * min(every):
            logarithmic(axes.yaxis, axes.set_yscale)
        elif min(every) >= 0:
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("block")
        axes.set_ylabel(label)
        if len(lines) > 1:
            spacing: Any = {"ncols": 4, "handlelength": 1.4, "columnspacing": 1.0}
            legend = axes.figure.legend(axes.lines, list(lines), loc="outside lower center", **spacing)
            for text in legend.get_texts():
                text.set_parse_math(False)

    ranges = "; ".join(
        f"{kind}: {min(line.values()):.3g} to {max(line.values()):.3g}, median {statistics.median(line.values()):.3g}"
        for kind, line in lines.items()
    )
    return Picture(title, f"{description} {ranges}.", draw, height=3.4 + 0.2 * math.ceil(len(lines) / 4))
