"""Search codebooks, block scales and codes in C (search.c, scales.c, nearest.c)."""

import torch

from d2q_edge.formats.tensor_types import GROUP
from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.native.threads import run


def search(table: CodebookSearch, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the best codebook of each group, as CodebookSearch.search."""
    _check(vectors)
    codebooks = torch.empty(len(vectors), dtype=torch.int64)
    errors = torch.empty(len(vectors))
    run("search", table.native_tables, len(vectors), vectors.contiguous(), codebooks, errors)
    return codebooks, errors


def block_scales(table: CodebookSearch, blocks: torch.Tensor) -> torch.Tensor:
    """Choose block scales by the approximate error of SCALE_STEPS, of blocks [rows, block_size] in code order."""
    scales = torch.empty(len(blocks))
    run("block_scales", table.native_tables, len(blocks), blocks.contiguous(), scales)
    return scales


def nearest_codes(table: CodebookSearch, vectors: torch.Tensor, codebooks: torch.Tensor) -> torch.Tensor:
    """Find the codes of the nearest entries, uint8 [groups, 32 / V], as CodebookSearch.nearest."""
    _check(vectors)
    codes = torch.empty(vectors.shape[:2], dtype=torch.uint8)
    run("nearest", table.native_tables, len(vectors), vectors.contiguous(), codebooks.contiguous(), codes)
    return codes


def _check(vectors: torch.Tensor) -> None:
    """Refuse what isn't whole groups in float32: the kernels would read beyond it."""
    if vectors.dtype != torch.float32 or vectors.shape[1] * vectors.shape[2] != GROUP:
        raise ValueError(f"a group is {GROUP} float32 weights, not {tuple(vectors.shape[1:])} {vectors.dtype}")
