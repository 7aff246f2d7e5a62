"""Conversions with --refine: the norms that the file has, and what is done again after an interruption."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2q_edge import conversion
from d2q_edge import output as output_module
from d2q_edge.gguf_reader import GGUFFile
from d2q_edge.quantize import refine as tuning
from d2q_edge.recipe import Options
from d2q_edge.refinement import Refinement, refine
from d2q_edge.work_dir import WorkDir
from tests.checkpoints import write_checkpoint

OPTIONS = Options(calibration_tokens=256, context=32, refine=True)


def run(output: Path, patches: Mapping[Any, Any] = {}) -> conversion.Conversion:
    model = output.parent / "model"
    if not model.exists():
        write_checkpoint(model, "qwen2", hidden_size=64, intermediate_size=128)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "PASSES", 1)
        patch.setattr(conversion, "refine", marked)
        for (place, name), value in patches.items():
            patch.setattr(place, name, value)
        return conversion.convert(model, output, OPTIONS)


def marked(*arguments: Any) -> Refinement:
    """Refine, and set a bias that tells refined blocks from others."""
    result, work = refine(*arguments), arguments[4]
    block = work.read_block(2, refined=True)
    work.write_block(2, {**block, "model.norm.bias": np.full(64, 0.5, np.float32)}, refined=True)
    return result


def test_interrupted_and_resumed_is_the_same(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole.gguf")
    assert whole.refinement is not None
    names = GGUFFile(tmp_path / "whole.gguf").tensors
    biases = {"output_norm.bias", *(f"blk.{i}.{norm}_norm.bias" for i in (0, 1) for norm in ("attn", "ffn"))}
    assert {name for name in names if name.endswith("norm.bias")} == biases
    assert set(GGUFFile(tmp_path / "whole.gguf").dequantize("output_norm.bias")) == {0.5}

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    write_block = WorkDir.write_block

    def stop_in_the_middle(work: WorkDir, index: int, tensors: Any, *, refined: bool = False) -> None:
        if refined and index == 1:
            raise KeyboardInterrupt
        write_block(work, index, tensors, refined=refined)

    output = tmp_path / "out.gguf"
    seen: list[Any] = []

    def count(*arguments: Any) -> Refinement:
        seen.append(arguments[3])
        return marked(*arguments)

    patches: list[tuple[dict[Any, Any], int]] = [
        ({(conversion, "refine"): stop}, 0),
        ({(WorkDir, "write_block"): stop_in_the_middle, (conversion, "refine"): count}, 1),
        ({(output_module.Output, "write"): stop, (conversion, "refine"): count}, 2),
    ]
    for patch, calls in patches:
        with pytest.raises(KeyboardInterrupt):
            run(output, patch)
        assert len(seen) == calls
    # Eight times as many windows as the blocks were calibrated with.
    assert [windows.shape for windows in seen] == [(64, 32)] * 2
    result = run(output, {(conversion, "refine"): None})
    assert result.refinement is None
    assert output.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert not (tmp_path / "out.gguf.work").exists()
