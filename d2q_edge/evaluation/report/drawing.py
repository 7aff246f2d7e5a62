"""Draw pictures with matplotlib, and write them to a file or as SVG elements of a page."""

import importlib.util
import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from d2q_edge.errors import D2QError
from d2q_edge.evaluation.report.palette import PAPER, Palette, use_variables

Draw = Callable[[Any, Palette], None]
"""A function that draws on matplotlib axes."""
WIDTH, HEIGHT = 5.0, 3.7
"""Inches; small, so that text stays readable when a phone shrinks the picture to its screen."""
RESOLUTION = 200
"""Dots per inch of a PNG."""


@dataclass(frozen=True)
class Picture:
    """One pair of axes, and the title and description that a screen reader reads."""

    title: str
    description: str
    draw: Draw
    height: float = HEIGHT


def require() -> None:
    """Check that matplotlib and jinja2 are installed.

    Raises:
        D2QError: it isn't.
    """
    if missing := [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]:
        raise D2QError(f"reports and pictures need {' and '.join(missing)}: pip install 'd2q-edge[report]'")


def save(pictures: list[Picture], path: Path) -> None:
    """Write pictures side by side to a .png or .svg file.

    Raises:
        D2QError: the file can't be written.
    """
    with _style():
        figure, axes = _figure(len(pictures), HEIGHT)
        for one, picture in zip(axes, pictures, strict=True):
            picture.draw(one, PAPER)
            one.set_title(picture.title, color=PAPER.ink, fontsize=10, loc="left")
        try:
            # Without the date, the same pictures make the same file.
            dated = {"Date": None} if path.suffix.lower() == ".svg" else None
            figure.savefig(path, facecolor=PAPER.paper, dpi=RESOLUTION, metadata=dated)
        except OSError as error:
            raise D2QError(f"can't write {path}: {error.strerror or error}") from error


def inline(picture: Picture, name: str) -> str:
    """Return a picture as an SVG element for a page; `name` makes its ids unique there."""
    file = io.StringIO()
    with _style():
        figure, (axes,) = _figure(1, picture.height)
        picture.draw(axes, PAPER)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    body = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    body = re.sub(r"<(metadata|style)\b.*?</\1>", "", body, flags=re.DOTALL)
    body = re.sub(r'(\bid="|"#|url\(#)', rf"\g<1>{name}-", body)
    # Text takes the page's font.
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body).replace("font-family: 'DejaVu Sans'", "")
    box = re.search(r'viewBox="([^"]+)"', svg)
    return (
        f'<svg viewBox="{box[1] if box else ""}" role="img" aria-labelledby="{name}-title {name}-text">'
        f'<title id="{name}-title">{escape(picture.title)}</title>'
        f'<desc id="{name}-text">{escape(picture.description)}</desc>{use_variables(body)}</svg>'
    )


@contextmanager
def _style() -> Iterator[None]:
    """Apply our matplotlib settings, from making a figure to saving it."""
    from matplotlib import rc_context

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "d2q",
        "font.size": 10,
        "font.family": "DejaVu Sans",
        "axes.labelcolor": PAPER.ink,
        "axes.edgecolor": PAPER.ink,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": PAPER.grid,
        "grid.linewidth": 0.8,
        "text.color": PAPER.ink,
        "xtick.color": PAPER.ink,
        "ytick.color": PAPER.ink,
        "legend.frameon": False,
        "legend.fontsize": 9,
    }
    with rc_context(settings), warnings.catch_warnings():
        # File names can be in any script: in an SVG the reader's fonts draw them, in a PNG they become boxes.
        for message in ("Glyph .* missing from", "Matplotlib currently does not support"):
            warnings.filterwarnings("ignore", message)
        yield


def _figure(count: int, height: float) -> tuple[Any, list[Any]]:
    """Make a figure with axes side by side. Without pyplot, it needs no display and no closing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH * count, height), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0].tolist()
