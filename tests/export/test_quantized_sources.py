"""Quantized checkpoints become the same file as by llama.cpp's own converter, for those that it can dequantize."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from d2q_edge.export.model_file import export
from d2q_edge.formats.gguf_reader import GGUFFile
from tests import stock
from tests.checkpoints import write_checkpoint
from tests.quantized_checkpoints import quantize

KINDS = (
    *("fp8-blocks", "modelopt", "ct-fp8-rows", "ct-fp8-blocks", "ct-int4", "ct-int4-asymmetric"),
    *("gptq", "gptq-8-bit", "gptq-asymmetric", "gptq-v2", "gptq-shuffled"),
)


@pytest.mark.slow
def test_file_is_the_stock_converters(tmp_path: Path, pristine_tree: Path) -> None:
    for kind in KINDS:
        write_checkpoint(tmp_path / kind, "qwen3", hidden_size=192, intermediate_size=320, num_hidden_layers=1)
        quantize(tmp_path / kind, kind)
    jobs = [(tmp_path / kind, "f32", tmp_path / f"{kind}.theirs.gguf") for kind in KINDS]
    stock.convert(pristine_tree, "qwen2", jobs)
    for kind in KINDS:
        export(tmp_path / kind, tmp_path / f"{kind}.gguf", "f32", verify=False)
        ours, theirs = GGUFFile(tmp_path / f"{kind}.gguf"), GGUFFile(tmp_path / f"{kind}.theirs.gguf")
        assert ours.kv == theirs.kv
        assert ours.tensors.keys() == theirs.tensors.keys()
        for tensor in ours.tensors:
            assert np.array_equal(ours.raw(tensor), theirs.raw(tensor)), (kind, tensor)
