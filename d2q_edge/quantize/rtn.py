"""Round to nearest: scales, codebooks and codes by squared error, without calibration or error feedback."""

import torch

from d2q_edge.quantize.codebook_search import CHUNK, CodebookSearch
from d2q_edge.quantize.quantized_layer import QuantizedLayer


def round_layer(weights: torch.Tensor, search: CodebookSearch) -> QuantizedLayer:
    """Quantize a matrix, float32 [rows, columns], where columns is a multiple of the block size."""
    kind = search.tensor_type
    rows = len(weights)
    parts = weights.reshape(-1, kind.block_size).split(CHUNK // kind.groups)
    found = zip(*(_round_blocks(part, search) for part in parts), strict=True)
    scales, codebooks, codes, rounded = (torch.cat(each).view(rows, -1) for each in found)
    return QuantizedLayer(scales.half(), codebooks.byte(), codes.byte(), rounded)


def _round_blocks(blocks: torch.Tensor, search: CodebookSearch) -> tuple[torch.Tensor, ...]:
    """Return scales [n], codebooks [n * groups], codes and rounded weights of blocks [n, block_size]."""
    scales = search.block_scales(blocks)
    vectors = search.vectors(blocks / scales[:, None])
    codebooks, _ = search.search(vectors)
    nearest, codes = search.nearest(vectors, codebooks)
    rounded = nearest.transpose(1, 2).reshape(blocks.shape) * scales[:, None]
    return scales, codebooks, codes, rounded
