"""Colours of the pictures: for paper, and for a page that follows the reader's choice of light or dark.

In a page a picture's colours are CSS variables. matplotlib can't draw with those, so that it is given colours that
nothing else has, and they are replaced in what it wrote.
"""

from dataclasses import dataclass

SERIES = 8
"""Colours for lines and points that must be told apart."""


@dataclass(frozen=True)
class Palette:
    """What a picture is drawn with: text and axes, lines behind the data, the paper, and the series."""

    ink: str
    grid: str
    paper: str
    series: tuple[str, ...]


# Okabe and Ito's colours, which people with any kind of colour vision can tell apart, two of them darkened for white.
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
MARKED = Palette(
    ink="#010203",
    grid="#010204",
    paper="#010205",
    series=tuple(f"#01021{index}" for index in range(SERIES)),
)


def variables(palette: Palette) -> str:
    """The palette as CSS declarations."""
    named = {"ink": palette.ink, "grid": palette.grid, "paper": palette.paper}
    named |= {f"s{index}": colour for index, colour in enumerate(palette.series)}
    return "".join(f"--{name}:{colour};" for name, colour in named.items())


def use_variables(svg: str) -> str:
    """A picture drawn with MARKED, its colours replaced by the CSS variables."""
    for name, colour in (("ink", MARKED.ink), ("grid", MARKED.grid), ("paper", MARKED.paper)):
        svg = svg.replace(colour, f"var(--{name})")
    for index, colour in enumerate(MARKED.series):
        svg = svg.replace(colour, f"var(--s{index})")
    return svg
