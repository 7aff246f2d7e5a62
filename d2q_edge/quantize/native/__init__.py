"""The quantizer's inner loops in C, for CPUs: compiled when they are first used, by the C compiler of the machine.

Where no compiler works, the same steps run in torch. Results differ from torch's in the last bits, where two codebooks
or codes are equally good, and where the search here is more thorough. They don't depend on the number of threads.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from d2q_edge.formats.tensor_types import TensorType

if TYPE_CHECKING:
    from d2q_edge.quantize.native.codebook_search import block_scales, nearest_codes, search
    from d2q_edge.quantize.native.descent import choose_block
    from d2q_edge.quantize.native.gptaq import quantize_block
    from d2q_edge.quantize.native.tables import Tables

__all__ = ["Tables", "block_scales", "choose_block", "is_available", "nearest_codes", "quantize_block", "search"]

_MODULES = {"Tables": "tables", "choose_block": "descent", "quantize_block": "gptaq"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'codebook_search')}"), name)


def is_available(kind: TensorType, device: torch.device) -> bool:
    """Return whether the kernels do a tensor type on a device: one with codebooks, on a CPU with a C compiler."""
    if device.type != "cpu" or not kind.has_codebooks:
        return False
    from d2q_edge.quantize.native.library import library

    return library() is not None
