"""What interruptions, kills and failures of a conversion leave behind, and that it goes on to the same file."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from d2q_edge import conversion
from d2q_edge.calibration import output_gradients
from d2q_edge.errors import D2QError
from d2q_edge.formats import gguf_writer
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.options import Options
from d2q_edge.pipeline import solver
from tests.checkpoints import write_checkpoint
from tests.interruption import interrupted, interrupted_at, when_printed
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
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("place", "function", "calls", "left"),
        [
            (output_gradients, "_block_gradients", 1, ["out.gguf.work"]),
            (solver, "quantize_layer", 2, ["out.gguf.work"]),
            (solver, "quantize_layer", 9, ["out.gguf.work"]),
            (gguf_writer, "encode", 7, ["out.gguf.work"]),
        ],
        ids=["gradients", "first block", "third block", "writing"],
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
        with interrupted(place, function, calls):
            conversion.convert(whole[0], output, QUICK, force=existing)
        assert sorted(path.name for path in tmp_path.iterdir()) == left
        if existing:
            assert output.read_text() == "old"
        conversion.convert(whole[0], output, QUICK, force=existing)
        assert output.read_bytes() == whole[1]
        assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]

    @pytest.mark.slow
    def test_finished_blocks_are_used(
        self, whole: tuple[Path, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        output = tmp_path / "out.gguf"
        self.stop(whole[0], output)
        capsys.readouterr()
        conversion.convert(whole[0], output, QUICK)
        said = capsys.readouterr().err.splitlines()
        assert f"resuming after 2 finished blocks from {output}.work" in said
        (line,) = [line for line in said if "Quantizing" in line]
        assert "block 3/3" in line

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"seed": 1}, "another calibration tokens, recipe;"),
            ({"bits": 3}, "another recipe, types;"),
            ({"context": 16}, "another calibration tokens, recipe;"),
        ],
    )
    def test_other_options_do_not_mix(
        self, whole: tuple[Path, bytes], tmp_path: Path, change: dict[str, Any], said: str
    ) -> None:
        output, other = tmp_path / "out.gguf", replace(QUICK, **change)
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

    @pytest.mark.slow
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
        """Interrupt a conversion when its second block is done."""
        with interrupted_at("block 2/3"):
            conversion.convert(model, output, QUICK)

    @pytest.mark.slow
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

    @pytest.mark.slow
    def test_rotated_and_plain_work_do_not_mix(self, whole: tuple[Path, bytes], tmp_path: Path) -> None:
        output, other = tmp_path / "out.gguf", replace(QUICK, rotation="on")
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
        self, make_checkpoint: Make, tmp_path: Path, name: str, calibrate: bool, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = make_checkpoint(**SMALL)
        tensors = load_file(model / "model.safetensors")
        tensors[name].view(-1)[5] = torch.nan
        save_file(tensors, model / "model.safetensors")
        with pytest.raises(D2QError, match=rf"tensor {name} in .* contains NaN"):
            conversion.convert(model, tmp_path / "out.gguf", replace(QUICK, calibrate=calibrate))
        assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
        assert "Quantizing" not in capsys.readouterr().err, "found before any work"

    def test_overflow(self, make_checkpoint: Make, tmp_path: Path) -> None:
        model = make_checkpoint(**SMALL, dtype=torch.float32)
        tensors = load_file(model / "model.safetensors")
        for layer in ("up", "down"):
            tensors[f"model.layers.0.mlp.{layer}_proj.weight"] *= 1e25
        save_file(tensors, model / "model.safetensors")
        with pytest.raises(D2QError, match=r"the inputs of model.layers.0.mlp.down_proj are too large"):
            conversion.convert(model, tmp_path / "out.gguf", QUICK)
        assert {path.name for path in tmp_path.iterdir()} == {"tiny", "out.gguf.work"}
        # No finished block is lost by another attempt, which isn't refused.
        with pytest.raises(D2QError, match=r"the inputs of model.layers.0.mlp.down_proj are too large"):
            conversion.convert(model, tmp_path / "out.gguf", replace(QUICK, seed=1))

    @pytest.mark.parametrize("rotation", ["on", "off"])
    def test_activations_that_do_not_vary(self, make_checkpoint: Make, tmp_path: Path, rotation: str) -> None:
        """Every token has the same embedding, and the first Hessian rank one."""
        model, output = self.with_embeddings(make_checkpoint, 0.02), tmp_path / "out.gguf"
        conversion.convert(model, output, replace(QUICK, rotation=rotation))
        file = GGUFFile(output)
        for name in file.tensors:
            assert np.isfinite(file.dequantize(name)).all(), name

    def test_activations_that_are_zero(self, make_checkpoint: Make, tmp_path: Path) -> None:
        """Nothing tells how the weights should be rounded: each goes to about the nearest value."""
        model, output = self.with_embeddings(make_checkpoint, 0.0), tmp_path / "out.gguf"
        conversion.convert(model, output, replace(QUICK, rotation="off"))
        file, weights = GGUFFile(output), load_file(model / "model.safetensors")
        for name, layer in (("ffn_up", "mlp.up_proj"), ("attn_v", "self_attn.v_proj")):
            found = file.dequantize(f"blk.0.{name}.weight")
            weight = weights[f"model.layers.0.{layer}.weight"].float().numpy()
            assert np.square(found - weight).sum() < 0.1 * np.square(weight).sum()

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
        with pytest.raises(D2QError, match=r"too large to calculate with|are NaN or infinite after model.layers.1"):
            conversion.convert(model, tmp_path / "out.gguf", QUICK)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf.work", "tiny"]

    def test_existing_output(self, make_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Refused before anything else is looked at."""
        (tmp_path / "out.gguf").write_text("old")
        for model in (make_checkpoint(**SMALL), tmp_path / "absent"):
            with pytest.raises(D2QError, match=r"out.gguf exists already; use --force"):
                conversion.convert(model, tmp_path / "out.gguf", QUICK)
        with pytest.raises(D2QError, match=r"out.gguf exists already; use --force"):
            conversion.execute(conversion.plan(tmp_path / "tiny", tmp_path / "out.gguf", QUICK))
        assert (tmp_path / "out.gguf").read_text() == "old"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "tiny"]
        assert capsys.readouterr().err == ""

    @pytest.mark.slow
    def test_full_disk_while_writing(self, make_checkpoint: Make, tmp_path: Path) -> None:
        """No file may be larger than the blocks; the finished ones stay."""
        model = make_checkpoint(**SMALL)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        try:
            # The output Hessians of guidance are larger than a block.
            with pytest.raises(D2QError, match=r"can't write .*complete.gguf.*File too large"):
                conversion.convert(model, tmp_path / "out.gguf", replace(QUICK, guidance=False))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf.work", "tiny"]
        conversion.convert(model, tmp_path / "out.gguf", replace(QUICK, guidance=False))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "tiny"]

    def test_broken_tokenizer(self, make_checkpoint: Make, tmp_path: Path) -> None:
        model = make_checkpoint(**SMALL)
        content = json.loads((model / "tokenizer.json").read_text("utf-8"))
        (model / "tokenizer.json").write_text(json.dumps({**content, "truncation": 5}), "utf-8")
        with pytest.raises(D2QError, match="transformers can't load the tokenizer"):
            conversion.convert(model, tmp_path / "out.gguf", QUICK)
        assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_an_output_that_appears_meanwhile_stays(whole: tuple[Path, bytes], tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    with (
        when_printed("block 1/3", lambda: output.write_text("somebody's")),
        pytest.raises(D2QError, match=r"out.gguf wasn't there when the conversion began, but is now"),
    ):
        conversion.convert(whole[0], output, QUICK)
    assert output.read_text() == "somebody's"
    output.unlink()
    conversion.convert(whole[0], output, QUICK)
    assert output.read_bytes() == whole[1]
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


@pytest.mark.slow
def test_progress_where_there_is_no_terminal(whole: tuple[Path, bytes], tmp_path: Path) -> None:
    """One line per block, on stderr: how far it is, the time it took and, but for the last, the time that is left."""
    arguments = ["convert", whole[0], "-o", "out.gguf", "--calibration-tokens", "512", "--context", "32"]
    done = subprocess.run(
        [sys.executable, "-m", "d2q_edge.cli", *map(str, arguments)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.gguf").read_bytes() == whole[1]
    lines = [line for line in done.stderr.splitlines() if "Quantizing" in line]
    assert len(lines) == 3, done.stderr
    time = r"(\d+ s|\d+ min \d+ s)"
    for number, line in enumerate(lines, 1):
        left = "" if number == 3 else f", about {time} left"
        weights = rf"Quantizing: [\d.]+k?/[\d.]+k weights, block {number}/3, mean error 0\.\d{{4}}"
        assert re.fullmatch(rf"{weights}, {time} elapsed{left}", line), line
    assert "Quantizing" not in done.stdout
    assert not re.search(r"[\r\x1b█]", done.stderr), "bars are for terminals"
