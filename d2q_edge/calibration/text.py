"""Read calibration and evaluation texts: the bundled ones, or UTF-8 files."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from d2q_edge.errors import D2QError

BUILTIN = {
    "calibration": Path(__file__).parents[1] / "data" / "calibration.txt",
    "evaluation": Path(__file__).parents[1] / "data" / "evaluation.txt",
}
"""Bundled public-domain texts; no piece of one is in the other (data/README.md)."""


@dataclass(frozen=True)
class Text:
    """A text, where it came from (a file name or "builtin"), and the SHA-256 of its UTF-8 bytes."""

    content: str
    source: str
    sha256: str


def load_text(where: str, builtin: str) -> Text:
    """Read the bundled text called `builtin` if `where` is "builtin", else the file `where`.

    Raises:
        D2QError: the file can't be read, isn't UTF-8, or is empty.
    """
    path = BUILTIN[builtin] if where == "builtin" else Path(where)
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise D2QError(f"can't read the text {path} ({error.strerror}); give a readable UTF-8 text file") from error
    except UnicodeDecodeError as error:
        raise D2QError(f"the text {path} is not UTF-8 (byte {error.start}); convert it or give another file") from error
    if not content.strip():
        raise D2QError(f"the text {path} is empty; give a file with some text")
    source = "builtin" if where == "builtin" else path.name
    return Text(content, source, hashlib.sha256(content.encode()).hexdigest())
