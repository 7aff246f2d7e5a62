"""Quantized checkpoints read as what their codes and scales stand for, computed without our code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from tests.quantized_checkpoints import KINDS, quantize

Make = Callable[..., Path]
SIZES = {"hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 1}
"""Not multiples of 128, so that the blocks at the ends are smaller."""


@pytest.mark.parametrize("kind", KINDS)
def test_every_format(make_checkpoint: Make, kind: str) -> None:
    directory = make_checkpoint("qwen3", **SIZES)
    meant = quantize(directory, kind)
    checkpoint = Checkpoint.open(directory)
    checkpoint.check(family_for(checkpoint.config).tensor_shapes())
    assert "quantization_config" not in checkpoint.config
    assert checkpoint.names == meant.keys()
    (note,) = checkpoint.notes
    assert f"stored as {KINDS[kind].code} (" in note
    assert ("stays lost" in note) == ("int" in KINDS[kind].code)
    for name, expected in meant.items():
        found = checkpoint.tensor(name)
        assert found.is_contiguous() and found.dtype == checkpoint.dtype(name) and found.shape == checkpoint.shape(name)
        if expected.dtype == torch.float64:
            assert found.dtype == torch.float32
            expected = expected.float()  # the product of a code and a scale, rounded once
        assert torch.equal(found, expected), name
