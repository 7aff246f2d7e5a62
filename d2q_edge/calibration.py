"""Calibration text to token windows.

Knows where text comes from and how it is cut into windows of equal length. Does not know the model; only its
tokenizer, through transformers.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from d2q_edge.errors import D2QError

BUILTIN = {
    "calibration": Path(__file__).parent / "data" / "calibration.txt",
    "evaluation": Path(__file__).parent / "data" / "evaluation.txt",
}
"""Bundled public-domain texts; no piece of one is in the other (data/README.md)."""


@dataclass(frozen=True)
class Text:
    """A text and where it came from: `source` is a file name or "builtin", `sha256` is of its UTF-8 bytes."""

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


def token_windows(
    tokenizer: Any, text: Text, tokens: int, context: int, seed: int, bos: int | None
) -> npt.NDArray[np.int64]:
    """Cut a text into windows of `context` tokens and take as many as make up `tokens`.

    Args:
        tokenizer: a transformers tokenizer.
        text: what to cut.
        tokens: calibration tokens wanted; a text too short for them gives all its windows.
        context: tokens per window.
        seed: of the choice among the windows, which stay in the order of the text.
        bos: token that the model expects first; it replaces the first token of every window, as in llama-perplexity.

    Returns:
        int64 [windows, context].

    Raises:
        D2QError: the text is shorter than one window.
    """
    ids = np.array(tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
    available = len(ids) // context
    if available == 0:
        raise D2QError(
            f"the calibration text has {len(ids)} tokens, less than one window of {context}; "
            "give a longer --calibration text or a smaller --context"
        )
    windows = ids[: available * context].reshape(available, context).copy()
    wanted = max(1, tokens // context)
    if wanted < available:
        chosen = np.random.default_rng(seed).choice(available, size=wanted, replace=False)
        windows = windows[np.sort(chosen)]
    if bos is not None:
        windows[:, 0] = bos
    return windows
