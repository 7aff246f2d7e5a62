"""Draw pictures with matplotlib, and write them to a file or as SVG elements of a page.

In a page, colors are CSS variables, so that it follows the reader's choice of light or dark. matplotlib can't draw
with those: it gets the light colors, which are replaced in the SVG that it writes.
"""

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

COLOURS = {
    "ink": ("#1c1c1e", "#ececf0"),
    "grid": ("#d9d9de", "#3a3a40"),
    "paper": ("#ffffff", "#161618"),
    "s0": ("#0072b2", "#4fb3ee"),
    "s1": ("#c45100", "#ff9040"),
    "s2": ("#00795b", "#3ad0a3"),
    "s3": ("#b3568b", "#e69ac6"),
    "s4": ("#a37700", "#e9c03f"),
    "s5": ("#2f86b8", "#a8d8f5"),
    "s6": ("#6b6b70", "#a9a9b2"),
    "s7": ("#7a3fb0", "#bf94f0"),
}
"""Light and dark, by the variable's name. Lines and points have Okabe and Ito's colors, safe for color-blind readers,
two of them darkened for a white background."""
INK, GRID, PAPER, *SERIES = [light for light, _ in COLOURS.values()]
WIDTH, HEIGHT = 5.0, 3.7
"""Inches; small, so that text stays readable when a phone shrinks the picture to its screen."""
RESOLUTION = 200
"""Dots per inch of a PNG."""


@dataclass(frozen=True)
class Picture:
    """A title and description that a screen reader reads, and a function that draws on matplotlib axes."""

    title: str
    description: str
    draw: Callable[[Any], None]
    height: float = HEIGHT


def require() -> None:
    """Raise a D2QError if matplotlib isn't installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise D2QError("reports and pictures need matplotlib: pip install 'd2q-edge[report]'")


def variables(*, dark: bool) -> str:
    """Return CSS declarations of the colors."""
    return "".join(f"--{name}:{pair[dark]};" for name, pair in COLOURS.items())


def save(pictures: list[Picture], path: Path) -> None:
    """Write pictures side by side to a .png or .svg file.

    Raises:
        D2QError: the file can't be written.
    """
    with _figure(len(pictures), HEIGHT) as (figure, axes):
        for one, picture in zip(axes, pictures, strict=True):
            picture.draw(one)
            one.set_title(picture.title, color=INK, fontsize=10, loc="left")
        try:
            # Without the date, the same pictures make the same file.
            dated = {"Date": None} if path.suffix.lower() == ".svg" else None
            figure.savefig(path, facecolor=PAPER, dpi=RESOLUTION, metadata=dated)
        except OSError as error:
            raise D2QError(f"can't write {path}: {error.strerror or error}") from error


def inline(picture: Picture, name: str) -> str:
    """Return a picture as an SVG element for a page; `name` makes its ids unique there."""
    file = io.StringIO()
    with _figure(1, picture.height) as (figure, (axes,)):
        picture.draw(axes)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    body = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    body = re.sub(r"<(metadata|style)\b.*?</\1>", "", body, flags=re.DOTALL)
    body = re.sub(r'(\bid="|"#|url\(#)', rf"\g<1>{name}-", body)
    # Text takes the page's font.
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body).replace("font-family: 'DejaVu Sans'", "")
    for variable, (light, _) in COLOURS.items():
        body = body.replace(light, f"var(--{variable})")
    box = re.search(r'viewBox="([^"]+)"', svg)
    return (
        f'<svg viewBox="{box[1] if box else ""}" role="img" aria-labelledby="{name}-title {name}-text">'
        f'<title id="{name}-title">{escape(picture.title)}</title>'
        f'<desc id="{name}-text">{escape(picture.description)}</desc>{body}</svg>'
    )


@contextmanager
def _figure(count: int, height: float) -> Iterator[tuple[Any, list[Any]]]:
    """Make a figure with axes side by side, with our settings until it is saved."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # unlike pyplot, needs no display and no closing

    colours = ("axes.labelcolor", "axes.edgecolor", "text.color", "xtick.color", "ytick.color")
    settings: Any = dict.fromkeys(colours, INK) | {
        "svg.fonttype": "none",
        "svg.hashsalt": "d2q",
        "font.size": 10,
        "font.family": "DejaVu Sans",
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "legend.frameon": False,
        "legend.fontsize": 9,
    }
    with rc_context(settings), warnings.catch_warnings():
        # File names can be in any script: in an SVG the reader's fonts draw them, in a PNG they become boxes.
        for message in ("Glyph .* missing from", "Matplotlib currently does not support"):
            warnings.filterwarnings("ignore", message)
        figure = Figure(figsize=(WIDTH * count, height), layout="constrained")
        yield figure, figure.subplots(1, count, squeeze=False)[0].tolist()
