"""Cut a calibration text into token windows of equal length, some of which are kept for validation."""

from typing import Any

import numpy as np
import numpy.typing as npt

from d2q_edge.calibration.text import Text
from d2q_edge.errors import D2QError

VALIDATION_TOKENS = 4096
"""Tokens that a conversion's result is measured on, where the text has more than are calibrated on."""


def token_windows(
    tokenizer: Any, text: Text, tokens: int, context: int, seed: int, bos: int | None
) -> npt.NDArray[np.int64]:
    """Cut a text into windows of `context` tokens and take as many as make up `tokens`; see `split_windows`.

    Returns:
        int64 [windows, context].
    """
    return split_windows(tokenizer, text, tokens, context, seed, bos)[0]


def split_windows(
    tokenizer: Any, text: Text, tokens: int, context: int, seed: int, bos: int | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Cut a text into windows of `context` tokens and take as many as make up `tokens`, and a few others.

    Args:
        tokenizer: a transformers tokenizer.
        text: what to cut.
        tokens: calibration tokens wanted; a text too short for them gives all its windows.
        context: tokens per window.
        seed: of the choice among the windows, which stay in the order of the text.
        bos: token that the model expects first; it replaces the first token of every window, as in llama-perplexity.

    Returns:
        Windows to calibrate on, int64 [windows, context], and windows of at most VALIDATION_TOKENS tokens that are not among
        them, spread over the rest of the text, in the same form.

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
    if bos is not None:
        windows[:, 0] = bos
    if wanted >= available:
        return windows, windows[:0]
    chosen = np.random.default_rng(seed).choice(available, size=wanted, replace=False)
    others = np.setdiff1d(np.arange(available), chosen)
    spread = (
        np.linspace(0, len(others) - 1, min(max(1, VALIDATION_TOKENS // context), len(others))).round().astype(np.int64)
    )
    return windows[np.sort(chosen)], windows[others[spread]]
