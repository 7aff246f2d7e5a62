"""Choose the torch device that computes."""

import os

import torch

from d2q_edge.errors import D2QError


def choose_device(name: str) -> torch.device:
    """Return the torch device for "auto", "cpu", "cuda" or "mps"; auto is cuda where there is one.

    Raises:
        D2QError: this machine has no such device.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if available["cuda"] else "cpu"
    if name == "cuda":
        # Steps of many sizes one after another would otherwise fragment half of what torch reserves.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if not available.get(name):
        raise D2QError(f"this machine's torch has no {name} device; use --device cpu")
    return torch.device(name)
