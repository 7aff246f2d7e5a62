"""Draw the pictures of a comparison: KL divergence and speed of all files against their size."""

from collections.abc import Callable, Sequence
from typing import Any

from d2q_edge.evaluation.benchmark import GENERATION
from d2q_edge.evaluation.comparison import GIVEN, REFERENCE, STOCK, Comparison, Row, size_text
from d2q_edge.evaluation.report.drawing import INK, PAPER, SERIES, Picture
from d2q_edge.evaluation.token_scores import TWO_SIDED

LOOKS = {GIVEN: (0, "o", "files"), STOCK: (1, "s", "stock types"), REFERENCE: (6, "D", "reference")}
"""Color, marker and legend of each kind of row."""
SIDES = (
    (7, 0, "left"), (-7, 0, "right"), (0, 11, "center"), (0, -11, "center"), (7, 11, "left"), (7, -11, "left"),
    (-7, 11, "right"), (-7, -11, "right"), (0, 22, "center"), (0, -22, "center"),
)  # fmt: skip
"""Where a name can be written: offset from its point, and alignment."""


def divergence_picture(comparison: Comparison) -> Picture:
    """Plot KL divergence on a logarithmic axis against bytes."""
    rows = [row for row in comparison.rows if row.evaluation.kl_divergence_mean is not None]
    divergences = {row.name: row.evaluation.kl_divergence_mean or 0.0 for row in rows}
    # A logarithmic axis has no zero: a file that equals the reference is drawn at the bottom.
    floor = min((value for value in divergences.values() if value), default=1e-6) / 10
    values = {name: max(value, floor) for name, value in divergences.items()}

    def draw(axes: Any) -> None:
        front = sorted(comparison.best(), key=lambda row: row.evaluation.bytes)
        logarithmic(axes.yaxis, axes.set_yscale)
        if len(front) > 1:
            axes.plot(
                [row.evaluation.bytes for row in front], [values[row.name] for row in front],
                color=INK, linewidth=1, linestyle=":", alpha=0.6, zorder=1,
            )  # fmt: skip
        for row in rows:
            half, center = TWO_SIDED * (row.evaluation.kl_divergence_stderr or 0.0), values[row.name]
            ends = [max(center - half, floor), center + half]
            axes.plot([row.evaluation.bytes] * 2, ends, color=INK, linewidth=1, zorder=2)
        axes.set_ylabel("KL divergence (nats per token)")
        _points(axes, rows, values)

    return Picture(
        "Distance from the original against size",
        "KL divergence on a logarithmic axis against file size; lower and further left is better. "
        + _list(rows, values),
        draw,
    )


def speed_picture(comparison: Comparison) -> Picture | None:
    """Plot generated tokens per second against bytes; None if speeds weren't measured."""
    rows = [row for row in comparison.rows if GENERATION in row.speeds]
    if not rows:
        return None
    values = {row.name: row.speeds[GENERATION] for row in rows}

    def draw(axes: Any) -> None:
        axes.set_ylabel("generated tokens per second")
        axes.set_ylim(0, 1.2 * max(values.values()))
        _points(axes, rows, values)

    return Picture(
        "Speed against size",
        f"Generated tokens per second on {comparison.threads} CPU threads against file size; higher and further left "
        f"is better. {_list(rows, values)}",
        draw,
    )


def logarithmic(axis: Any, set_scale: Callable[[str], None], steps: Sequence[float] = (1.0, 2.0, 5.0)) -> None:
    """Make an axis logarithmic, with plain numbers at these multiples of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    set_scale("log")
    axis.set_major_locator(LogLocator(10, steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.minorticks_off()


def _list(rows: Sequence[Row], values: dict[str, float]) -> str:
    return "; ".join(f"{row.name}: {size_text(row.evaluation.bytes)}, {values[row.name]:.4g}" for row in rows) + "."


def _points(axes: Any, rows: Sequence[Row], values: dict[str, float]) -> None:
    """Draw points with their names, a marker and a color for each kind of file, sizes on the horizontal axis."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for kind, (colour, marker, label) in LOOKS.items():
        of_kind = [row for row in rows if row.kind == kind]
        if of_kind:
            axes.plot(
                [row.evaluation.bytes for row in of_kind], [values[row.name] for row in of_kind],
                linestyle="none", marker=marker, markersize=7, color=SERIES[colour], label=label, zorder=3,
            )  # fmt: skip
    sizes = [row.evaluation.bytes for row in rows]
    # Sizes differ little, or tenfold; a linear axis would squeeze most of the latter.
    if max(sizes) > 4 * min(sizes):
        logarithmic(axes.xaxis, axes.set_xscale, (1.0, 2.0, 5.0) if max(sizes) < 100 * min(sizes) else (1.0,))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size_text(round(value)) if value > 0 else ""))
    axes.margins(x=0.16, y=0.16)
    axes.set_xlabel("file size")
    axes.legend(loc="best")
    _name_points(axes, rows, values)


def _name_points(axes: Any, rows: Sequence[Row], values: dict[str, float]) -> None:
    """Write each name on the side of its point where it overlaps the fewest other names and points."""
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()
    points = [(row.evaluation.bytes, values[row.name]) for row in rows]
    radius = 5 * axes.figure.dpi / 72  # of a marker of 10 points, in pixels
    taken = [Bbox((center - radius, center + radius)) for center in axes.transData.transform(points)]
    left, right = axes.bbox.intervalx
    for row, point in zip(rows, points, strict=True):
        label = axes.annotate(
            row.name if len(row.name) <= 24 else row.name[:23] + "…", point, xytext=(0, 0), textcoords="offset points",
            va="center", fontsize=9, zorder=4, parse_math=False,
            bbox={"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 0.6},
        )  # fmt: skip
        boxes = [_move(label, side) for side in SIDES]
        costs = [box.count_overlaps(taken) + 10 * (box.x0 < left or box.x1 > right) for box in boxes]
        taken.append(_move(label, SIDES[costs.index(min(costs))]))


def _move(label: Any, side: tuple[int, int, str]) -> Any:
    """Move an annotation to one of SIDES, and return its box in the figure."""
    label.set(position=side[:2], ha=side[2])
    return label.get_window_extent()
