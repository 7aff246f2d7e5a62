"""Cut a calibration text into token windows of equal length, for calibration and for validation."""

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from d2q_edge.calibration.text import Text
from d2q_edge.errors import D2QError

Integer = TypeVar("Integer", bound=np.integer[Any])
VALIDATION_TOKENS = 4096
"""Tokens on which a conversion's result is measured, as far as the text has more than are calibrated on."""


def split_windows(
    tokenizer: Any, text: Text, tokens: int, context: int, seed: int, bos: int | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Cut a text into windows of `context` tokens, and draw some for calibration and a few others for validation.

    Args:
        tokenizer: a transformers tokenizer.
        text: what to cut.
        tokens: calibration tokens wanted; a text too short for them gives all its windows.
        context: tokens per window.
        seed: of the random choice; windows stay in the order of the text.
        bos: token that the model expects first; it replaces the first token of every window, as in llama-perplexity.

    Returns:
        Calibration windows, int64 [windows, context], and validation windows: at most VALIDATION_TOKENS
        tokens, spread over the rest of the text.

    Raises:
        D2QError: the text is shorter than one window.
    """
    ids = np.array(tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
    windows = cut_windows(ids, context, bos)
    available = len(windows)
    if available == 0:
        raise D2QError(
            f"the calibration text has {len(ids)} tokens, less than one window of {context}; "
            "give a longer --calibration text or a smaller --context"
        )
    wanted = max(1, tokens // context)
    if wanted >= available:
        return windows, windows[:0]
    chosen = np.random.default_rng(seed).choice(available, size=wanted, replace=False)
    others = np.setdiff1d(np.arange(available), chosen)
    count = min(max(1, VALIDATION_TOKENS // context), len(others))
    spread = np.linspace(0, len(others) - 1, count).round().astype(np.int64)
    return windows[np.sort(chosen)], windows[others[spread]]


def cut_windows(ids: npt.NDArray[Integer], context: int, bos: int | None) -> npt.NDArray[Integer]:
    """Cut tokens [n] into as many windows [n // context, context] as they fill, with `bos`, if any, first in each."""
    windows = ids[: len(ids) // context * context].reshape(-1, context).copy()
    if bos is not None:
        windows[:, 0] = bos
    return windows
