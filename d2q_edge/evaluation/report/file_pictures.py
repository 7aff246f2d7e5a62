"""The two pictures of a comparison: how near files are to the original, and how fast, against their size."""

from collections.abc import Sequence
from typing import Any, TypeAlias

from d2q_edge.evaluation.benchmark import GENERATION
from d2q_edge.evaluation.compare import GIVEN, STOCK, Comparison, Row, size_text
from d2q_edge.evaluation.report.drawing import Picture
from d2q_edge.evaluation.report.palette import Palette

LOOKS = {GIVEN: (0, "o", "files"), STOCK: (1, "s", "stock types"), "reference": (6, "D", "reference")}
"""Colour, marker and legend of each kind of row."""
Box: TypeAlias = "tuple[float, float, float, float]"
"""Left, bottom, right, top."""


def divergence_picture(comparison: Comparison) -> Picture:
    """KL divergence, on a logarithmic axis, against bytes."""
    rows = [row for row in comparison.rows if row.evaluation.kl_divergence_mean is not None]
    # A logarithmic axis has no zero; a file that equals the reference is drawn at the bottom.
    positive = [row.evaluation.kl_divergence_mean or 0 for row in rows if row.evaluation.kl_divergence_mean]
    floor = min(positive, default=1e-6) / 10
    values = {row.name: max(row.evaluation.kl_divergence_mean or 0.0, floor) for row in rows}

    def draw(axes: Any, palette: Palette) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator

        front = sorted(comparison.best(), key=lambda row: row.evaluation.bytes)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(10, (1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.minorticks_off()
        if len(front) > 1:
            axes.plot(
                [row.evaluation.bytes for row in front], [values[row.name] for row in front],
                color=palette.ink, linewidth=1, linestyle=":", alpha=0.6, zorder=1,
            )  # fmt: skip
        for row in rows:
            half, center = 1.96 * (row.evaluation.kl_divergence_stderr or 0.0), values[row.name]
            ends = [max(center - half, floor), center + half]
            axes.plot([row.evaluation.bytes] * 2, ends, color=palette.ink, linewidth=1, zorder=2)
        axes.set_ylabel("KL divergence (nats per token)")
        _points(axes, palette, rows, values)

    said = "; ".join(f"{row.name}: {size_text(row.evaluation.bytes)}, {values[row.name]:.4g}" for row in rows)
    return Picture(
        "Distance from the original against size",
        f"KL divergence on a logarithmic axis against file size; lower and further left is better. {said}.",
        draw,
    )


def speed_picture(comparison: Comparison) -> Picture | None:
    """Generated tokens per second against bytes; None if speeds weren't measured."""
    rows = [row for row in comparison.rows if GENERATION in row.speeds]
    if not rows:
        return None
    values = {row.name: row.speeds[GENERATION] for row in rows}

    def draw(axes: Any, palette: Palette) -> None:
        axes.set_ylabel("generated tokens per second")
        axes.set_ylim(0, 1.2 * max(values.values()))
        _points(axes, palette, rows, values)

    said = "; ".join(f"{row.name}: {size_text(row.evaluation.bytes)}, {values[row.name]:.4g}" for row in rows)
    return Picture(
        "Speed against size",
        f"Generated tokens per second on {comparison.threads} CPU threads against file size; higher and further left "
        f"is better. {said}.",
        draw,
    )


def _points(axes: Any, palette: Palette, rows: Sequence[Row], values: dict[str, float]) -> None:
    """Points with their names, a marker and a colour for each kind of file, sizes on the horizontal axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    for kind, (colour, marker, label) in LOOKS.items():
        of_kind = [row for row in rows if row.kind == kind]
        if of_kind:
            axes.plot(
                [row.evaluation.bytes for row in of_kind], [values[row.name] for row in of_kind],
                linestyle="none", marker=marker, markersize=7, color=palette.series[colour], label=label, zorder=3,
            )  # fmt: skip
    sizes = [row.evaluation.bytes for row in rows]
    # Files of a model differ little or tenfold; only in the second case would a linear axis squeeze most of them.
    if max(sizes) > 4 * min(sizes):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(10, (1.0, 2.0, 5.0) if max(sizes) < 100 * min(sizes) else (1.0,)))
        axes.xaxis.minorticks_off()
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size_text(round(value)) if value > 0 else ""))
    axes.margins(x=0.16, y=0.16)
    axes.set_xlabel("file size")
    axes.legend(loc="best")
    _name_points(axes, palette, rows, values)


def _name_points(axes: Any, palette: Palette, rows: Sequence[Row], values: dict[str, float]) -> None:
    """Write names beside points, on whichever side keeps them apart from names and points that are there."""
    figure = axes.figure
    figure.draw_without_rendering()
    place = axes.transData.transform
    # In points, as the offsets of annotations are.
    scale = 72 / figure.dpi
    points = [tuple(scale * place((row.evaluation.bytes, values[row.name]))) for row in rows]
    taken: list[Box] = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    low, high = (scale * edge for edge in axes.get_window_extent().intervalx)
    for row, (x, y) in zip(rows, points, strict=True):
        text = row.name if len(row.name) <= 24 else row.name[:23] + "…"
        width, height = 5.3 * len(text), 11.0
        options: list[tuple[float, int, int, int, str, Box]] = []
        for dx, dy, side in ((7, 0, "left"), (-7, 0, "right"), (0, 11, "center"), (0, -11, "center"), (7, 11, "left"),
                             (7, -11, "left"), (-7, 11, "right"), (-7, -11, "right"), (0, 22, "center"),
                             (0, -22, "center")):  # fmt: skip
            left = x + dx - {"left": 0.0, "right": width, "center": width / 2}[side]
            box = left, y + dy - height / 2, left + width, y + dy + height / 2
            cost = sum(_overlap(box, other) for other in taken) + 20 * max(0.0, low - box[0], box[2] - high)
            options.append((cost, len(options), dx, dy, side, box))
        _, _, dx, dy, side, box = min(options)
        taken.append(box)
        axes.annotate(
            text, (row.evaluation.bytes, values[row.name]), xytext=(dx, dy), textcoords="offset points",
            ha=side, va="center", fontsize=9, zorder=4, parse_math=False,
            bbox={"facecolor": palette.paper, "edgecolor": "none", "alpha": 0.75, "pad": 0.6},
        )  # fmt: skip


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
