"""The quantizer's inner loops as Triton kernels, which are imported when they are first used.

PyTorch's CUDA builds for Linux include Triton; where there is none, the same steps run in torch. Results differ from
torch's in the last bits, and where two codebooks or codes are equally good.
"""

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from d2q_edge.quantize.triton.codebook_search import block_scales, search
    from d2q_edge.quantize.triton.descent import choose_block
    from d2q_edge.quantize.triton.gptaq import quantize_block
    from d2q_edge.quantize.triton.nearest_entry import nearest_entries
    from d2q_edge.quantize.triton.trellis import best_codes

__all__ = ["best_codes", "block_scales", "choose_block", "is_available", "nearest_entries", "quantize_block", "search"]

_MODULES = {
    "best_codes": "trellis",
    "choose_block": "descent",
    "nearest_entries": "nearest_entry",
    "quantize_block": "gptaq",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'codebook_search')}"), name)


@cache
def is_available(device: torch.device) -> bool:
    """Return whether the kernels run on a device: it is a CUDA device, and Triton is installed."""
    if device.type != "cuda":
        return False
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True
