"""What tests of checkpoints and weight files have in common."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2q_edge.errors import D2QError
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for


def refused(directory: Path, pattern: str) -> None:
    """Opening and checking must fail with one sentence that matches."""
    with pytest.raises(D2QError, match=pattern) as caught:
        checkpoint = Checkpoint.open(directory)
        checkpoint.check(family_for(checkpoint.config).tensor_shapes())
    assert "\n" not in str(caught.value)


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Load the one weight file, change the tensors and save them."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
