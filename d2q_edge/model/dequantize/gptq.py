"""Dequantize GPTQ's integers (arXiv 2210.17323) as AutoGPTQ and GPTQModel store them.

Sources: GPTQModel, nn_modules/qlinear/__init__.py (packing) and utils/model.py (the two versions of zero points);
llama.cpp's converter, conversion/base.py.

qweight, int32 [in * bits / 32, out], packs columns; qzeros, int32 [groups, out * bits / 32], rows; scales are
[groups, out], and g_idx, int32 [in], names the group of every input, in any order if desc_act is set. The first version
of the format stores zero points less one.
"""

from collections.abc import Mapping
from typing import Any

import torch

from d2q_edge.errors import D2QError
from d2q_edge.model.dequantize.entry import FLOATS, DequantizedEntry, Parts, contradiction, dequantized, matrix, part
from d2q_edge.model.dequantize.packing import WORD, packed_words, unpack
from d2q_edge.model.dequantize.scaling import check_groups, dequantize

PARTS = frozenset(("qweight", "qzeros", "scales", "g_idx"))
BITS = (2, 3, 4, 8)
_VERSION = {"gptq": 1, "gptq_v2": 2}


def weight(module: str, parts: Parts, settings: Mapping[str, Any]) -> DequantizedEntry | None:
    """Describe a module's weight; see `entry.Format`."""
    if "qweight" not in parts:
        return None
    layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if not isinstance(layout, str) or layout not in _VERSION or settings.get("is_marlin_format"):
        raise D2QError(
            f"the checkpoint's GPTQ weights are in the form {layout!r:.40}, which is for one kernel only; use the "
            "unquantized checkpoint, or one in the form 'gptq'"
        )
    stored, (words, outputs) = matrix(module, parts, "qweight", ("I32",))
    index = part(module, parts, "g_idx", ("I32", "I64")) if "g_idx" in parts else None
    # Layers may differ in their bits ("dynamic"), and then only g_idx says how many.
    bits = settings.get("bits") if index is None or not index.shape else words * WORD // max(1, index.shape[0])
    if type(bits) is not int or bits not in BITS:
        raise contradiction(module, stored)
    inputs = words * WORD // bits
    if index is not None and index.shape != (inputs,):
        raise contradiction(module, index)
    scales, (groups, _) = matrix(module, parts, "scales", FLOATS)
    if scales.shape != (groups, outputs) or groups > inputs:
        raise contradiction(module, scales)
    zeros = part(module, parts, "qzeros", ("I32",), (groups, packed_words(outputs, bits)))
    version = _VERSION[layout]

    def compute() -> torch.Tensor:
        size = -(-inputs // groups)
        own = torch.arange(inputs) // size if index is None else check_groups(module, index.load(), groups)
        codes = unpack(stored.load().T, bits, inputs)
        points = unpack(zeros.load(), bits, outputs) if version == 2 else _first_version(zeros.load(), bits, outputs)
        return dequantize(codes, scales.load().T, points.T, 1, own)

    return dequantized(module, stored, (outputs, inputs), f"int{bits}", compute)


def _first_version(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Unpack zero points that are stored less one.

    GPTQModel subtracts from whole words, so that a zero borrows from its neighbor, but from each value of 3 bits alone.
    """
    if bits == 3:
        return (unpack(words, bits, count) + 1) & 7
    ones = (2**WORD - 1) // (2**bits - 1)
    return unpack(words + ones, bits, count)
