"""Dequantize what the compressed-tensors library (llm-compressor, vLLM) stores: 8-bit floats, and integers.

Source: compressed-tensors, compressors/naive_quantized and compressors/pack_quantized.

"float-quantized", "int-quantized" and "naive-quantized" store a weight of one byte each, "pack-quantized" stores
weight_packed, int32 [out, in * bits / 32], of integers without sign: 2 ** (bits - 1) is added to them and to their zero
points, int32 [out * bits / 32, groups]. weight_scale has one value for a matrix, a row, a block, or a group of a row's
columns; weight_g_idx names the group of every column where they aren't in order. Which of quantization_config's groups
a layer belongs to follows from the shapes of its tensors. Scales of activations are for the runtime only.
"""

from collections.abc import Mapping
from typing import Any

import torch

from d2q_edge.errors import D2QError
from d2q_edge.model.dequantize.entry import DequantizedEntry, Parts, contradiction, dequantized, matrix, part
from d2q_edge.model.dequantize.fp8 import CODES, SCALES
from d2q_edge.model.dequantize.packing import WORD, packed_words, unpack
from d2q_edge.model.dequantize.scaling import (
    Block,
    block_size,
    check_groups,
    dequantize,
    dequantize_blocks,
    find_block,
    grid,
)

PARTS = frozenset(
    (
        *("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "input_scale"),
        *("input_zero_point", "output_scale", "output_zero_point", "k_scale", "v_scale", "q_scale"),
    )
)
_FORMS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "mixed-precision", "dense")
_BITS = (2, 4, 8)


def weight(module: str, parts: Parts, settings: Mapping[str, Any]) -> DequantizedEntry | None:
    """Describe a module's weight; see `entry.Format`."""
    packed = "weight_packed" in parts
    if not packed and ("weight" not in parts or parts["weight"].dtype not in (*CODES, "I8")):
        return None
    schemes = _schemes(settings)
    return _packed(module, parts, schemes) if packed else _plain(module, parts, schemes)


def _schemes(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return how weights are quantized in each group of layers; raise D2QError for a form that isn't supported."""
    groups = settings.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, Mapping) else []
    if not groups or not all(isinstance(group, Mapping) for group in groups):
        raise D2QError("config.json: quantization_config has no config_groups, which say how weights are quantized")
    sparsity = settings.get("sparsity_config") or {}
    forms = [settings.get("format"), *(group.get("format") for group in groups)]
    forms.append(sparsity.get("format") if isinstance(sparsity, Mapping) else sparsity)
    if settings.get("transform_config"):
        forms.append("transformed")
    for form in forms:
        if form is not None and form not in _FORMS:
            raise D2QError(
                f"the checkpoint is compressed by compressed-tensors in the form {form!r:.40}, which can't be "
                "dequantized here; use the unquantized checkpoint"
            )
    return [group["weights"] for group in groups if isinstance(group.get("weights"), Mapping)]


def _blocks(scheme: Mapping[str, Any], shape: Block) -> list[Block]:
    """Return the blocks that scales may be for."""
    blocks = []
    if scheme.get("block_structure") is not None:
        blocks.append(block_size(scheme["block_structure"]))
    if (size := scheme.get("group_size")) is not None and size != -1:
        blocks.append(block_size([1, size]))
    return [*blocks, shape, (1, shape[1])]


def _plain(module: str, parts: Parts, schemes: list[Mapping[str, Any]]) -> DequantizedEntry:
    stored, shape = matrix(module, parts, "weight", (*CODES, "I8"))
    scale = part(module, parts, "weight_scale", SCALES)
    all_found = (find_block(scale.shape, shape, _blocks(scheme, shape)) for scheme in schemes)
    found = {block for block in all_found if block is not None}
    if len(found) != 1:
        raise contradiction(module, scale)
    (block,) = found
    zero = part(module, parts, "weight_zero_point", ("I8",), scale.shape) if "weight_zero_point" in parts else None
    code = "int8" if stored.dtype == "I8" else "fp8"

    def compute() -> torch.Tensor:
        return dequantize_blocks(stored.load(), scale.load(), None if zero is None else zero.load(), block)

    return dequantized(module, stored, shape, code, compute)


def _packed(module: str, parts: Parts, schemes: list[Mapping[str, Any]]) -> DequantizedEntry:
    stored, (rows, words) = matrix(module, parts, "weight_packed", ("I32",))
    scale = part(module, parts, "weight_scale", SCALES)
    stated = part(module, parts, "weight_shape", ("I64", "I32"), (2,))
    found = set()
    for scheme in schemes:
        bits = scheme.get("num_bits")
        if type(bits) is int and bits in _BITS and scheme.get("type", "int") == "int":
            shape = rows, words * WORD // bits
            if (block := find_block(scale.shape, shape, _blocks(scheme, shape))) is not None:
                found.add((bits, shape, block))
    if len(found) != 1:
        raise contradiction(module, stored)
    ((bits, shape, block),) = found
    counts = grid(shape, block)
    zero = index = None
    if "weight_zero_point" in parts:
        zero = part(module, parts, "weight_zero_point", ("I32",), (packed_words(counts[0], bits), counts[1]))
    if "weight_g_idx" in parts:
        index = part(module, parts, "weight_g_idx", ("I32", "I64"), shape[1:])

    def compute() -> torch.Tensor:
        if tuple(stated.load().tolist()) != shape:
            raise contradiction(module, stated)
        codes, scales = unpack(stored.load(), bits, shape[1]), scale.load().reshape(counts)
        middle = torch.full(counts, 1 << (bits - 1), dtype=torch.uint8)
        zeros = middle if zero is None else unpack(zero.load().T, bits, counts[0]).T
        if index is None:
            return dequantize_blocks(codes, scales, zeros, block)
        return dequantize(codes, scales, zeros, block[0], check_groups(module, index.load(), counts[1]))

    return dequantized(module, stored, shape, f"int{bits}", compute)
