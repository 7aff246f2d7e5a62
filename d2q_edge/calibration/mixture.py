"""Mix several calibration texts: parse FILE:WEIGHT, and share the tokens out among them."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from d2q_edge.calibration.text import BUILTIN, Text, load_calibration
from d2q_edge.errors import D2QError
from d2q_edge.utils.files import split_number


@dataclass(frozen=True)
class Part:
    """One text of a mixture, and its weight: the share of the tokens that it gets, relative to the others."""

    text: Text
    weight: float = 1.0
    path: Path | None = None  # None for the bundled text


def load_parts(where: str | Sequence[str]) -> tuple[Part, ...]:
    """Read the texts named by one or several entries FILE, FILE:WEIGHT, "builtin" or "builtin:WEIGHT".

    Raises:
        D2QError: there are none, a weight isn't a positive number, or a text can't be read (`load_calibration`).
    """
    entries = (where,) if isinstance(where, str) else tuple(where)
    if not entries:
        raise D2QError("there is no calibration text; name one, or leave the bundled one")
    parts = []
    for entry in entries:
        name, weight = _parse(entry)
        parts.append(Part(load_calibration(name), weight, None if name == BUILTIN else Path(name)))
    return tuple(parts)


def names(parts: Sequence[Part]) -> str:
    """Return what the texts are called, with the weights of several."""
    return ", ".join(part.text.source + (f":{part.weight:g}" if len(parts) > 1 else "") for part in parts)


def digest(parts: Sequence[Part]) -> str:
    """Return the SHA-256 of the texts: of one its own, of several that of the list of theirs."""
    hashes = [part.text.sha256 for part in parts]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def share_out(total: int, weights: Sequence[float], limits: Sequence[int]) -> list[int]:
    """Divide `total` things by weight among parts that have only so many; what one lacks, the others give.

    Returns:
        A number for each part; their sum is `total`, or the sum of the limits if that is less.
    """
    counts = [0] * len(weights)
    open_parts = [index for index, limit in enumerate(limits) if limit]
    while open_parts:
        left = total - sum(counts)
        scale = sum(weights[index] for index in open_parts)
        quotas = {index: left * weights[index] / scale for index in open_parts}
        if full := [index for index in open_parts if quotas[index] >= limits[index]]:
            for index in full:
                counts[index] = limits[index]
            open_parts = [index for index in open_parts if index not in full]
            continue
        for index, quota in quotas.items():
            counts[index] = math.floor(quota)
        # What is left after rounding down goes to the largest remainders, of equal ones to the first.
        by_remainder = sorted(open_parts, key=lambda index: counts[index] - quotas[index])
        for index in by_remainder[: total - sum(counts)]:
            counts[index] += 1
        break
    return counts


def _parse(entry: str) -> tuple[str, float]:
    """Split FILE:WEIGHT; a file that exists under the whole name wins."""
    name, weight = split_number(entry)
    if weight is not None and not 0 < weight < math.inf:
        raise D2QError(f"the weight of the calibration text {name} must be a positive number, not {weight:g}")
    return name, 1.0 if weight is None else weight
