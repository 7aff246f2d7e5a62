"""Define the colours of pictures: for paper, and for a page that follows the reader's choice of light or dark.

In a page, colours are CSS variables. matplotlib can't draw with those: it gets the colours of PAPER, which are replaced
in the SVG that it writes.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Palette:
    """Colours of text and axes (ink), grid lines, background (paper), and lines or points (series)."""

    ink: str
    grid: str
    paper: str
    series: tuple[str, ...]


# Okabe and Ito's colours, safe for colour-blind readers, two of them darkened for a white background.
PAPER = Palette(
    ink="#1c1c1e",
    grid="#d9d9de",
    paper="#ffffff",
    series=("#0072b2", "#c45100", "#00795b", "#b3568b", "#a37700", "#2f86b8", "#6b6b70", "#7a3fb0"),
)
NIGHT = Palette(
    ink="#ececf0",
    grid="#3a3a40",
    paper="#161618",
    series=("#4fb3ee", "#ff9040", "#3ad0a3", "#e69ac6", "#e9c03f", "#a8d8f5", "#a9a9b2", "#bf94f0"),
)


def variables(palette: Palette) -> str:
    """Return the palette as CSS declarations."""
    return "".join(f"--{name}:{colour};" for name, colour in _named(palette))


def use_variables(svg: str) -> str:
    """Replace the colours of PAPER in an SVG by CSS variables."""
    for name, colour in _named(PAPER):
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def _named(palette: Palette) -> list[tuple[str, str]]:
    series = [(f"s{index}", colour) for index, colour in enumerate(palette.series)]
    return [("ink", palette.ink), ("grid", palette.grid), ("paper", palette.paper), *series]
