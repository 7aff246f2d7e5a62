"""What interruptions, kills and failures of a conversion leave behind, and that it goes on to the same file."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from d2q_edge import conversion
from d2q_edge.errors import D2QError
from d2q_edge.formats import gguf_writer
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.options import Options
from d2q_edge.pipeline import block_loop, solver
from tests.checkpoints import write_checkpoint
from tests.interruption import interrupt_after
from tests.paths import ROOT

Make = Callable[..., Path]
QUICK = Options(calibration_tokens=512, context=32)
SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A model and the file that an undisturbed conversion makes of it."""
    directory = tmp_path_factory.mktemp("whole")
    write_checkpoint(directory / "model", "llama", **SMALL)
    conversion.convert(directory / "model", directory / "out.gguf", QUICK)
    return directory / "model", (directory / "out.gguf").read_bytes()


class TestInterruptions:
    @pytest.mark.parametrize(
        ("place", "function", "calls", "left"),
        [
            (solver, "quantize_layer", 2, []),
            (solver, "quantize_layer", 9, ["out.gguf.work"]),
            (gguf_writer, "encode", 7, ["out.gguf.work"]),
        ],
        ids=["first block", "third block", "writing"],
    )
    @pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
    def test_resumed_file_is_the_same(
        self,
        whole: tuple[Path, bytes],
        tmp_path: Path,
        place: Any,
        function: str,
        calls: int,
        left: list[str],
        existing: bool,
    ) -> None:
        output = tmp_path / "out.gguf"
        if existing:
            output.write_text("old")
            left = ["out.gguf", *left]
        with pytest.MonkeyPatch.context() as patch:
            interrupt_after(patch, place, function, calls)
            with pytest.raises(KeyboardInterrupt):
                conversion.convert(whole[0], output, QUICK, force=existing)
        assert sorted(path.name for path in tmp_path.iterdir()) == left
        if existing:
            assert output.read_text() == "old"
        conversion.convert(whole[0], output, QUICK, force=existing)
        assert output.read_bytes() == whole[1]
        assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]

    def test_finished_blocks_are_used(self, whole: tuple[Path, bytes], tmp_path: Path, capsys: Any) -> None:
        output = tmp_path / "out.gguf"
        for calls, finished in ((9, None), (0, 2)):
            with pytest.MonkeyPatch.context() as patch:
                interrupt_after(patch, solver, "quantize_layer", calls)
                with pytest.raises(KeyboardInterrupt):
                    conversion.convert(whole[0], output, QUICK)
            said = capsys.readouterr().err.partition("\n")[2]
            assert said == (f"going on after {finished} finished blocks in {output}.work\n" if finished else "")

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"seed": 1}, "another calibration tokens, recipe;"),
            ({"bits": 3}, "another recipe, types;"),
            ({"context": 16}, "another calibration tokens, recipe;"),
        ],
    )
    def test_other_options_do_not_mix(
        self, whole: tuple[Path, bytes], tmp_path: Path, change: dict[str, int], said: str
    ) -> None:
        output, other = tmp_path / "out.gguf", Options(**{**vars(QUICK), **change})
        self.stop(whole[0], output)
        with pytest.raises(D2QError, match=said):
            conversion.convert(whole[0], output, other)
        conversion.convert(whole[0], output, other, force=True)
        conversion.convert(whole[0], tmp_path / "direct.gguf", other)
        assert output.read_bytes() == (tmp_path / "direct.gguf").read_bytes()

    def test_other_weights_do_not_mix(self, make_checkpoint: Make, tmp_path: Path) -> None:
        model, output = make_checkpoint(**SMALL), tmp_path / "out.gguf"
        self.stop(model, output)
        weights = load_file(model / "model.safetensors")
        save_file({name: tensor * 2 for name, tensor in weights.items()}, model / "model.safetensors")
        with pytest.raises(D2QError, match="another weight files;"):
            conversion.convert(model, output, QUICK)

    def test_damaged_block(self, whole: tuple[Path, bytes], tmp_path: Path) -> None:
        output = tmp_path / "out.gguf"
        self.stop(whole[0], output)
        block = tmp_path / "out.gguf.work" / "block-0001.safetensors"
        block.write_bytes(block.read_bytes()[:-1])
        with pytest.raises(D2QError, match=r"block-0001.safetensors is damaged"):
            conversion.convert(whole[0], output, QUICK)
        block.unlink()
        conversion.convert(whole[0], output, QUICK)
        assert output.read_bytes() == whole[1]

    def stop(self, model: Path, output: Path) -> None:
        """Interrupt a conversion in its third block."""
        with pytest.MonkeyPatch.context() as patch:
            interrupt_after(patch, solver, "quantize_layer", 9)
            with pytest.raises(KeyboardInterrupt):
                conversion.convert(model, output, QUICK)

    def test_killed_process(self, tmp_path: Path) -> None:
        """A real process, really killed."""
        write_checkpoint(tmp_path / "model", "qwen3", **{**SMALL, "num_hidden_layers": 8})
        output = tmp_path / "out.gguf"
        arguments = ["convert", "model", "-o", "out.gguf", "--calibration-tokens", "8192", "--context", "256"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(
            [sys.executable, "-m", "d2q_edge.cli", *arguments],
            cwd=tmp_path,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            second = tmp_path / "out.gguf.work" / "block-0001.safetensors"
            deadline = time.monotonic() + 120
            while not second.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            process.kill()
            assert process.wait() == -signal.SIGKILL, process.communicate()[1]
        assert second.exists()
        assert not output.exists()
        options = Options(calibration_tokens=8192, context=256)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            conversion.convert("model", Path("out.gguf"), options)
            conversion.convert("model", Path("whole.gguf"), options)
        assert output.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
        assert {path.name for path in tmp_path.iterdir()} == {"model", "out.gguf", "whole.gguf"}

    def test_rotated_and_plain_work_do_not_mix(self, whole: tuple[Path, bytes], tmp_path: Path) -> None:
        output, other = tmp_path / "out.gguf", Options(**{**vars(QUICK), "rotation": "on"})
        self.stop(whole[0], output)
        with pytest.raises(D2QError, match=r"another .*recipe;"):
            conversion.convert(whole[0], output, other)
        conversion.convert(whole[0], output, other, force=True)
        conversion.convert(whole[0], tmp_path / "direct.gguf", other)
        assert output.read_bytes() == (tmp_path / "direct.gguf").read_bytes()


class TestFailures:
    @pytest.mark.parametrize("calibrate", [True, False])
    @pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.2.mlp.down_proj.weight", "model.norm.weight"])
    def test_nan_anywhere_is_found_and_leaves_nothing(
        self, make_checkpoint: Make, tmp_path: Path, name: str, calibrate: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = make_checkpoint(**SMALL)
        tensors = load_file(model / "model.safetensors")
        tensors[name].view(-1)[5] = torch.nan
        save_file(tensors, model / "model.safetensors")
        monkeypatch.setattr(solver, "quantize_layer", None)  # found before any work
        with pytest.raises(D2QError, match=rf"tensor {name} in .* contains NaN"):
            conversion.convert(model, tmp_path / "out.gguf", Options(**{**vars(QUICK), "calibrate": calibrate}))
        assert [path.name for path in tmp_path.iterdir()] == ["tiny"]

    def test_overflow_leaves_nothing(self, make_checkpoint: Make, tmp_path: Path) -> None:
        model = make_checkpoint(**SMALL, dtype=torch.float32)
        tensors = load_file(model / "model.safetensors")
        for layer in ("up", "down"):
            tensors[f"model.layers.0.mlp.{layer}_proj.weight"] *= 1e25
        save_file(tensors, model / "model.safetensors")
        with pytest.raises(D2QError, match=r"the inputs of model.layers.0.mlp.down_proj are too large"):
            conversion.convert(model, tmp_path / "out.gguf", QUICK)
        assert [path.name for path in tmp_path.iterdir()] == ["tiny"]

    @pytest.mark.parametrize("rotation", ["on", "off"])
    def test_activations_that_do_not_vary(self, make_checkpoint: Make, tmp_path: Path, rotation: str) -> None:
        """Every token has the same embedding, and the first Hessian rank one."""
        model, output = self.with_embeddings(make_checkpoint, 0.02), tmp_path / "out.gguf"
        conversion.convert(model, output, Options(**{**vars(QUICK), "rotation": rotation}))
        file = GGUFFile(output)
        for name in file.tensors:
            assert np.isfinite(file.dequantize(name)).all(), name

    def test_activations_that_are_zero(self, make_checkpoint: Make, tmp_path: Path) -> None:
        model = self.with_embeddings(make_checkpoint, 0.0)
        with pytest.raises(D2QError, match="statistics of a layer can't be factored; use more or more varied"):
            conversion.convert(model, tmp_path / "out.gguf", QUICK)
        assert [path.name for path in tmp_path.iterdir()] == ["tiny"]

    def with_embeddings(self, make_checkpoint: Make, value: float) -> Path:
        """A model whose tokens all have one embedding, of one value."""
        model = make_checkpoint(**SMALL)
        tensors = load_file(model / "model.safetensors")
        tensors["model.embed_tokens.weight"].fill_(value)
        save_file(tensors, model / "model.safetensors")
        return model

    def test_activations_that_overflow(self, make_checkpoint: Make, tmp_path: Path) -> None:
        """Beyond float32, not only beyond its squares."""
        model = make_checkpoint(**SMALL, dtype=torch.float32)
        tensors = load_file(model / "model.safetensors")
        for layer in ("gate", "up", "down"):
            tensors[f"model.layers.1.mlp.{layer}_proj.weight"] *= 1e19
        save_file(tensors, model / "model.safetensors")
        with pytest.raises(D2QError, match=r"too large to calculate with|are NaN or infinite behind model.layers.1"):
            conversion.convert(model, tmp_path / "out.gguf", QUICK)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf.work", "tiny"]

    def test_existing_output(self, make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "out.gguf").write_text("old")
        monkeypatch.setattr(conversion, "quantize_blocks", None)
        with pytest.raises(D2QError, match=r"out.gguf exists already; use --force"):
            conversion.convert(make_checkpoint(**SMALL), tmp_path / "out.gguf", QUICK)
        assert (tmp_path / "out.gguf").read_text() == "old"

    def test_full_disk_while_writing(
        self, make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(_: object) -> None:
            raise OSError(28, "No space left on device")

        model = make_checkpoint(**SMALL)
        monkeypatch.setattr(gguf_writer, "encode", full)
        with pytest.raises(D2QError, match="the disk is full"):
            conversion.convert(model, tmp_path / "out.gguf", QUICK)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf.work", "tiny"]
        monkeypatch.undo()
        conversion.convert(model, tmp_path / "out.gguf", QUICK)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "tiny"]

    def test_broken_tokenizer(self, make_checkpoint: Make, tmp_path: Path) -> None:
        model = make_checkpoint(**SMALL)
        content = json.loads((model / "tokenizer.json").read_text("utf-8"))
        (model / "tokenizer.json").write_text(json.dumps({**content, "truncation": 5}), "utf-8")
        with pytest.raises(D2QError, match="transformers can't load the tokenizer"):
            conversion.convert(model, tmp_path / "out.gguf", QUICK)
        assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_an_output_that_appears_meanwhile_stays(
    whole: tuple[Path, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, blocks = tmp_path / "out.gguf", block_loop.quantize_blocks

    def somebody_writes(*arguments: Any, **options: Any) -> Any:
        output.write_text("somebody's")
        return blocks(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "quantize_blocks", somebody_writes)
        with pytest.raises(D2QError, match=r"out.gguf wasn't there when the conversion began, but is now"):
            conversion.convert(whole[0], output, QUICK)
    assert output.read_text() == "somebody's"
    output.unlink()
    conversion.convert(whole[0], output, QUICK)
    assert output.read_bytes() == whole[1]
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
