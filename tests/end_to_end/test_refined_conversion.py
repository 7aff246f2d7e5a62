"""Conversions with --refine: the norms that the file has, and what is done again after an interruption."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2q_edge import conversion
from d2q_edge.errors import D2QError
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.options import Options
from d2q_edge.pipeline import output as output_module
from d2q_edge.pipeline import refinement
from d2q_edge.pipeline.refinement import Refinement, refine
from d2q_edge.pipeline.work_dir import WorkDir
from d2q_edge.quantize import refine as tuning
from tests.checkpoints import write_checkpoint

OPTIONS = Options(calibration_tokens=256, context=32, refine=True)


def run(output: Path, patches: Mapping[Any, Any] = {}, passes: int = 1) -> conversion.Conversion:
    model = output.parent / "model"
    if not model.exists():
        write_checkpoint(model, "qwen2", hidden_size=64, intermediate_size=128)
    with pytest.MonkeyPatch.context() as patch:
        # So that codes change in a few steps.
        patch.setattr(tuning, "SCHEDULE", tuning.Schedule(passes=passes, code_rate=1.4, code_travel=100.0))
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


class TestInTheMiddle:
    """Refinement goes on after the last whole pass, though the memory is another one now."""

    @pytest.fixture(scope="class")
    @staticmethod
    def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
        path = tmp_path_factory.mktemp("refined") / "whole.gguf"
        result = run(path, passes=3)
        assert result.refinement is not None and result.refinement.codes
        return path

    @staticmethod
    def interrupted(output: Path, step: int, **patches: Any) -> None:
        """Refine with three passes of three steps (and a rest that is left out), stopped before a step."""
        steps = [0]

        def backward(*arguments: Any) -> None:
            steps[0] += 1
            if steps[0] == step:
                raise KeyboardInterrupt
            original(*arguments)

        original = tuning._backward
        with pytest.raises(KeyboardInterrupt):
            run(output, {(tuning, "_backward"): backward}, passes=3)

    @staticmethod
    def counted(output: Path, *, memory: int = 1 << 40) -> int:
        """Finish it; how many steps that takes."""
        steps = [0]

        def backward(*arguments: Any) -> None:
            steps[0] += 1
            original(*arguments)

        original = tuning._backward
        run(output, {(tuning, "_backward"): backward, (refinement, "_free_memory"): lambda _: memory}, passes=3)
        return steps[0]

    @pytest.mark.parametrize(("stopped", "left"), [(3, 9), (4, 6), (9, 3)])
    def test_same_file(self, whole: Path, stopped: int, left: int) -> None:
        output = whole.with_name("out.gguf")
        self.interrupted(output, stopped)
        kept = (output.parent / "out.gguf.work" / "refining.safetensors").exists()
        assert kept == (left < 9)
        # No memory for codes, but they were being tuned.
        assert self.counted(output, memory=0 if kept else 1 << 40) == left
        assert output.read_bytes() == whole.read_bytes()
        assert not (output.parent / "out.gguf.work").exists()
        output.unlink()

    def test_twice(self, whole: Path) -> None:
        output = whole.with_name("out.gguf")
        self.interrupted(output, 5)
        self.interrupted(output, 4)
        assert self.counted(output) == 3
        assert output.read_bytes() == whole.read_bytes()
        output.unlink()

    def test_without_room_on_the_disk(
        self, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        output = whole.with_name("out.gguf")
        real = shutil.disk_usage
        monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=1 << 20))
        self.interrupted(output, 9)
        assert "refinement starts over if it is interrupted: to go on, it would need 0.0 GiB" in capsys.readouterr().err
        assert not (output.parent / "out.gguf.work" / "refining.safetensors").exists()
        assert self.counted(output) == 9
        assert output.read_bytes() == whole.read_bytes()
        output.unlink()

    def test_damaged(self, whole: Path) -> None:
        output = whole.with_name("out.gguf")
        self.interrupted(output, 7)
        state = output.parent / "out.gguf.work" / "refining.safetensors"
        content = bytearray(state.read_bytes())
        content[-1] ^= 1
        state.write_bytes(content)
        with pytest.raises(D2QError, match=r"refining.safetensors is damaged .*; remove it and convert again"):
            run(output, passes=3)
        state.unlink()
        assert self.counted(output) == 9
        assert output.read_bytes() == whole.read_bytes()
