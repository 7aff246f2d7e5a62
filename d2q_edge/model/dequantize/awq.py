"""Dequantize AWQ's 4-bit integers (arXiv 2306.00978) as AutoAWQ stores them in its version "gemm".

Source: AutoAWQ, awq/modules/linear/gemm.py and awq/utils/packing_utils.py.

qweight, int32 [in, out / 8], and qzeros, int32 [groups, out / 8], pack eight outputs in a word, interleaved: from the
lowest bits on, these are 0, 2, 4, 6, 1, 3, 5, 7. scales are [groups, out].
"""

from collections.abc import Mapping
from typing import Any

import torch

from d2q_edge.errors import D2QError
from d2q_edge.model.dequantize.entry import FLOATS, DequantizedEntry, Parts, contradiction, dequantized, matrix, part
from d2q_edge.model.dequantize.packing import unpack
from d2q_edge.model.dequantize.scaling import dequantize

PARTS = frozenset(("qweight", "qzeros", "scales"))
_BITS, _PACKED = 4, 8
_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where each of eight outputs is in its word."""


def weight(module: str, parts: Parts, settings: Mapping[str, Any]) -> DequantizedEntry | None:
    """Describe a module's weight; see `entry.Format`."""
    if "qweight" not in parts:
        return None
    layout = settings.get("version") or settings.get("format") or "gemm"
    bits = settings.get("bits", settings.get("w_bit", _BITS))
    if str(layout).lower() != "gemm" or bits != _BITS:
        raise D2QError(
            f"the checkpoint's AWQ weights are in the form {layout!r:.40} with {bits!r:.40} bits, but only 'gemm' with "
            f"{_BITS} can be dequantized; use the unquantized checkpoint"
        )
    stored, (inputs, words) = matrix(module, parts, "qweight", ("I32",))
    outputs = words * _PACKED
    scales, (groups, _) = matrix(module, parts, "scales", FLOATS)
    if scales.shape != (groups, outputs) or inputs % groups:
        raise contradiction(module, scales)
    zeros = part(module, parts, "qzeros", ("I32",), (groups, words))

    def compute() -> torch.Tensor:
        codes, points = _unpack(stored.load()), _unpack(zeros.load())
        own = torch.arange(inputs) // (inputs // groups)
        return dequantize(codes, scales.load().T, points, 1, own)

    return dequantized(module, stored, (outputs, inputs), f"int{_BITS}", compute)


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """Return the values of int32 [rows, words] as uint8 [8 * words, rows]."""
    rows, count = words.shape
    values = unpack(words, _BITS, _PACKED * count).view(rows, count, _PACKED)[:, :, _PLACES]
    return values.view(rows, -1).T.contiguous()
