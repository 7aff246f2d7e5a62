"""Write a comparison as one self-contained HTML page (page.html is its template), or as pictures."""

import platform
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from d2q_edge import __version__, runtime
from d2q_edge.errors import D2QError
from d2q_edge.evaluation.comparison import GIVEN, REFERENCE, Comparison, Row, size_text
from d2q_edge.evaluation.report import drawing
from d2q_edge.evaluation.report.file_pictures import divergence_picture, speed_picture
from d2q_edge.evaluation.report.layer_pictures import layer_pictures
from d2q_edge.export.conversion_report import FIELDS

PICTURES = (".png", ".svg")
PAGES = (".html", ".htm")
LAYERS = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
"""Order of the layers; others come last."""


def check_target(path: Path) -> None:
    """Raise a D2QError if `write` can't write to a path: its suffix or directory, or matplotlib isn't installed."""
    if path.suffix.lower() not in (*PAGES, *PICTURES):
        raise D2QError(f"{path} should end in .html for a report, or in .png or .svg for a picture")
    if not path.absolute().parent.is_dir():
        raise D2QError(f"the output directory {path.parent} doesn't exist; create it first")
    drawing.require()


def write(comparison: Comparison, path: Path) -> None:
    """Write a comparison as a page (.html) or as pictures side by side (.png, .svg).

    Raises:
        D2QError: see check_target; or the file can't be written.
    """
    check_target(path)
    if path.suffix.lower() in PICTURES:
        speed = speed_picture(comparison)
        drawing.save([divergence_picture(comparison), *([speed] if speed else [])], path)
        return
    try:
        # JSON and file names can have lone surrogates, which UTF-8 can't encode.
        path.write_text(page(comparison), encoding="utf-8", errors="replace")
    except OSError as error:
        raise D2QError(f"can't write {path}: {error.strerror or error}") from error


def page(comparison: Comparison) -> str:
    """Render the page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["size"] = size_text
    pictures, best = (divergence_picture(comparison), speed_picture(comparison)), comparison.best()
    return environment.get_template("page.html").render(
        comparison=comparison,
        rows=[{"row": row, "best": row in best, "is_reference": row.kind == REFERENCE} for row in comparison.rows],
        speeds=any(row.speeds for row in comparison.rows),
        pictures=[_shown(picture, f"p{index}") for index, picture in enumerate(pictures) if picture],
        files=[_inside(row, index) for index, row in enumerate(comparison.rows) if row.kind == GIVEN],
        allocations=_allocations([row for row in comparison.rows if row.allocation and row.kind != REFERENCE]),
        light=drawing.variables(dark=False),
        dark=drawing.variables(dark=True),
        version=__version__,
        runtime=runtime.info().version,
        machine=f"{platform.system()} on {platform.machine()}",
    )


def _inside(row: Row, index: int) -> dict[str, Any]:
    """Return the values of a file's section: what the report of its conversion has."""
    report = {field: (row.conversion or {}).get(field) or {} for field in FIELDS}
    pictures = [_shown(each, f"f{index}l{number}") for number, each in enumerate(layer_pictures(report))]
    return {"row": row, "report": report, "pictures": pictures}


def _shown(picture: drawing.Picture, name: str) -> dict[str, Any]:
    from markupsafe import Markup

    return {"title": picture.title, "svg": Markup(drawing.inline(picture, name))}


def _allocations(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the types of every file's matrices; a type has the same color in all files."""
    kinds = sorted({kind for row in rows for types in row.allocation.values() for kind in types.values()})
    colours = {kind: index % len(drawing.SERIES) for index, kind in enumerate(kinds)}
    found = []
    for row in rows:
        own = sorted({kind for types in row.allocation.values() for kind in types.values()})
        layers = sorted(row.allocation, key=lambda layer: (LAYERS.index(layer) if layer in LAYERS else 99, layer))
        spans = {layer: _spans(row.allocation[layer]) for layer in layers} if len(own) > 1 else {}
        found.append({"name": row.name, "kinds": own, "layers": spans, "colours": colours})
    return found


def _spans(types: Mapping[int, str]) -> list[dict[str, Any]]:
    """Return runs of blocks that have a matrix in the same type, or don't have it."""
    runs = []
    for kind, run in groupby(range(max(types) + 1), key=types.get):
        numbers = list(run)
        label = f"block {numbers[0]}" if len(numbers) == 1 else f"blocks {numbers[0]} to {numbers[-1]}"
        runs.append({"type": kind or "", "columns": len(numbers), "label": label})
    return runs
