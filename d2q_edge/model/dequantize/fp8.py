"""Dequantize 8-bit floats with a scale for every block, row or matrix.

Sources: DeepSeek-V3's README_WEIGHTS.md (weight_scale_inv multiplies, in spite of its name, blocks of the size
weight_block_size), which Qwen3's FP8 models follow; transformers' integrations/finegrained_fp8.py and fbgemm_fp8.py;
AutoFP8 and NVIDIA ModelOpt, which have one weight_scale for a matrix. Scales of activations are for the runtime only.
"""

from collections.abc import Mapping
from typing import Any

from d2q_edge.model.dequantize.entry import FLOATS, DequantizedEntry, Parts, contradiction, dequantized, matrix, part
from d2q_edge.model.dequantize.scaling import block_size, dequantize_blocks, find_block

PARTS = frozenset(
    ("weight_scale_inv", "weight_scale", "input_scale", "activation_scale", "output_scale", "k_scale", "v_scale")
)
CODES = ("F8_E4M3", "F8_E5M2")
SCALES = (*FLOATS, "F8_E8M0")


def weight(module: str, parts: Parts, settings: Mapping[str, Any]) -> DequantizedEntry | None:
    """Describe a module's weight; see `entry.Format`."""
    if "weight" not in parts or parts["weight"].dtype not in CODES:
        return None
    stored, shape = matrix(module, parts, "weight", CODES)
    scale = part(module, parts, "weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale", SCALES)
    own = settings.get("weight_block_size")
    blocks = ([] if own is None else [block_size(own)]) + [shape, (1, shape[1])]
    block = find_block(scale.shape, shape, blocks)
    if block is None:
        raise contradiction(module, scale)
    return dequantized(
        module, stored, shape, "fp8", lambda: dequantize_blocks(stored.load(), scale.load(), None, block)
    )
