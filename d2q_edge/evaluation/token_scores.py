"""Score tokens from logits in float64: negative log-likelihood, KL divergence, top-1 agreement; their statistics.

The scores and standard errors are those of llama.cpp's tools/perplexity/perplexity.cpp.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]
Logits = npt.NDArray[np.floating[Any]]
TWO_SIDED = 1.96
"""Standard errors to each side of a 95 % confidence interval."""
MIN_VALUES = 11
"""Fewer values have no standard error, as in llama-perplexity."""
ROWS = 64
"""Positions that are scored at a time: float64 copies of all logits may not fit in memory."""


def log_softmax(logits: Logits) -> Floats:
    """Return the log-probabilities, float64 [rows, vocab], of logits [rows, vocab]."""
    shifted: Floats = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def score_tokens(logits: Logits, targets: Tokens, reference: Logits | None = None) -> Floats:
    """Score predictions of the next token.

    Args:
        logits: of the file, [positions, vocab].
        targets: the tokens that came next, int32 [positions].
        reference: logits of the reference, up to a constant per position; None without one.

    Returns:
        float64 [4, positions]: negative log-likelihood of the target in nats, the same of the reference, KL divergence
        of the file from the reference in nats, and 1 where both have the same most likely token. [1, positions] without
        a reference.
    """
    parts = []
    for start in range(0, len(targets), ROWS):
        rows = slice(start, start + ROWS)
        chosen = np.arange(len(targets[rows])), targets[rows]
        found = log_softmax(logits[rows])
        scores = [-found[chosen]]
        if reference is not None:
            expected = log_softmax(reference[rows])
            divergence = (np.exp(expected) * (expected - found)).sum(axis=1)
            scores += [-expected[chosen], divergence, found.argmax(axis=1) == expected.argmax(axis=1)]
        parts.append(np.array(scores))
    return np.concatenate(parts, axis=1)


def stderr(values: Floats) -> float:
    """Return the standard error of a mean; 0 for fewer than MIN_VALUES values, as in llama-perplexity."""
    return float(values.std() / math.sqrt(len(values) - 1)) if len(values) >= MIN_VALUES else 0.0


def quantile_interval(values: Floats, fraction: float) -> tuple[float, float]:
    """Return a 95 % confidence interval of a quantile, without assuming a distribution.

    The number of values below the true quantile is binomial, so the ends are the values of rank n f -/+ 1.96
    sqrt(n f (1 - f)), rounded up (Conover, Practical Nonparametric Statistics, section 3.2). With few values the upper
    end is the largest one, which is too low.
    """
    ordered = np.sort(values)
    center, spread = len(ordered) * fraction, TWO_SIDED * math.sqrt(len(ordered) * fraction * (1 - fraction))
    low, high = (min(max(math.ceil(rank), 1), len(ordered)) for rank in (center - spread, center + spread))
    return float(ordered[low - 1]), float(ordered[high - 1])
