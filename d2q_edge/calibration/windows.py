"""Cut calibration texts into token windows of equal length, and draw some for calibration and others for validation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from d2q_edge.calibration.chat_template import ChatTemplate
from d2q_edge.calibration.mixture import Part, share_out
from d2q_edge.errors import D2QError

Integer = TypeVar("Integer", bound=np.integer[Any])
VALIDATION_TOKENS = 4096
"""Tokens, at most, on which a conversion's result is measured."""
HELD_OUT = 10
"""One of so many windows of every text is never calibrated on."""


@dataclass(frozen=True)
class Windows:
    """Token windows.

    Attributes:
        calibration: token ids, int64 [windows, context].
        validation: other windows; the same ones whatever `tokens` and `seed` are.
        counts: calibration windows by part.
        available: tokens of all texts.
        notes: sentences for the user.
    """

    calibration: npt.NDArray[np.int64]
    validation: npt.NDArray[np.int64]
    counts: tuple[int, ...]
    available: int
    notes: tuple[str, ...] = ()


def split_windows(
    tokenizer: Any,
    parts: Sequence[Part],
    template: ChatTemplate,
    tokens: int,
    context: int,
    seed: int,
    bos: int | None,
) -> Windows:
    """Cut texts into windows of `context` tokens, and draw some for calibration and others for validation.

    A tenth of every text is held out; validation windows are drawn evenly from it. Calibration windows are shared out
    among the texts by weight, and drawn evenly from the rest of every text.

    Args:
        tokenizer: a transformers tokenizer.
        parts: the texts.
        template: renders their conversations.
        tokens: calibration tokens wanted; texts too short for them give all of it that isn't held out.
        context: tokens per window.
        seed: of the random choice; windows stay in the order of the text.
        bos: token that the model expects first; it replaces the first token of every window, as in llama-perplexity.

    Raises:
        D2QError: a text is shorter than one window, or none has a second one.
    """
    held, rest, available = [], [], 0
    for part in parts:
        content = part.text.render(template)
        ids = np.array(tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
        windows = cut_windows(ids, context, bos)
        least = 2 if len(parts) == 1 else 1
        if len(windows) < least:
            raise D2QError(
                f"the calibration text {part.text.source} has {len(ids)} tokens, but it takes {least * context}, "
                f"{'one window' if least == 1 else 'a window to calibrate on and one for validation'}; give a longer "
                "--calibration text or a smaller --context"
            )
        out = _centers(len(windows), max(1, len(windows) // HELD_OUT) if len(windows) > 1 else 0)
        held.append(windows[out])
        rest.append(np.delete(windows, out, axis=0))
        available += len(ids)
    if not any(len(windows) for windows in held):
        raise D2QError(f"no text has a second window of {context} tokens, for validation; give a longer one")
    weights = [part.weight for part in parts]
    counts = share_out(max(1, tokens // context), weights, [len(windows) for windows in rest])
    validated = share_out(max(1, VALIDATION_TOKENS // context), weights, [len(windows) for windows in held])
    generator = np.random.default_rng(seed)
    chosen = [windows[_draw(len(windows), count, generator)] for windows, count in zip(rest, counts, strict=True)]
    measured = [windows[_centers(len(windows), count)] for windows, count in zip(held, validated, strict=True)]
    return Windows(np.concatenate(chosen), np.concatenate(measured), tuple(counts), available, template.notes)


def cut_windows(ids: npt.NDArray[Integer], context: int, bos: int | None) -> npt.NDArray[Integer]:
    """Cut tokens [n] into as many windows [n // context, context] as they fill, with `bos`, if any, first in each."""
    windows = ids[: len(ids) // context * context].reshape(-1, context).copy()
    if bos is not None:
        windows[:, 0] = bos
    return windows


def _centers(available: int, count: int) -> npt.NDArray[np.int64]:
    """Return the middles of `count` equal stretches of range(available)."""
    return (np.arange(count) * available + available // 2) // max(1, count)


def _draw(available: int, count: int, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return one random index out of each of `count` equal stretches of range(available)."""
    edges = np.arange(count + 1) * available // max(1, count)
    return generator.integers(edges[:-1], edges[1:])
