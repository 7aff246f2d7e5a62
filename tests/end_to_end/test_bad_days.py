"""Everything that goes wrong ends in one sentence and an exit code, and costs nothing: through the command line."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from d2q_edge import cli, conversion
from d2q_edge.formats import gguf_writer, tensor_file
from d2q_edge.formats.gguf_reader import GGUFFile, TensorInfo
from d2q_edge.formats.quantized_block import QuantizedBlock
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.options import Options
from d2q_edge.pipeline import planning, solver
from d2q_edge.pipeline.work_dir import WorkDir
from d2q_edge.utils import files
from tests.checkpoints import write_checkpoint
from tests.command_line import Call, Result
from tests.interruption import interrupt_after

OPTIONS = ["--calibration-tokens", "512", "--context", "32"]
SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


def refused(result: Result) -> str:
    """The one sentence of a command that can't be carried out."""
    assert result.code == 1, result
    *_, sentence = result.err.splitlines()
    assert result.err.count("Error: ") == 1
    assert sentence.startswith("Error: ")
    assert "Traceback" not in result.err
    return sentence


def left() -> list[str]:
    """Names of the files in the current directory."""
    return sorted(path.name for path in Path.cwd().iterdir())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bad") / "model"
    write_checkpoint(directory, "llama", **SMALL)
    return directory


@pytest.fixture(scope="module")
def expected(model: Path) -> bytes:
    """The file of an undisturbed conversion."""
    conversion.convert(model, model.parent / "out.gguf", Options(calibration_tokens=512, context=32))
    return (model.parent / "out.gguf").read_bytes()


INTERRUPTED = "Interrupted. A conversion goes on where it stopped when the command is repeated.\n"


def full(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


class TestDisk:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("place", "name", "sentence", "kept"),
        [
            (
                tensor_file,
                "save_file",
                "No space left on device.*free some disk space and run the same command",
                ["out.gguf.work"],
            ),
            (
                gguf_writer,
                "encode",
                "the disk is full: .* free some space and run the same command",
                ["out.gguf.work"],
            ),
            (files, "replace", "No space left on device|the disk is full", []),
        ],
        ids=["block", "output", "rename"],
    )
    def test_full(
        self, d2q: Call, model: Path, expected: bytes, place: Any, name: str, sentence: str, kept: list[str]
    ) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, name, full)
            said = refused(d2q("convert", model, "-o", "out.gguf", *OPTIONS))
        assert re.search(sentence, said), said
        assert left() == kept
        assert d2q("convert", model, "-o", "out.gguf", *OPTIONS).code == 0
        assert Path("out.gguf").read_bytes() == expected
        assert left() == ["out.gguf"]

    @pytest.mark.slow
    @pytest.mark.parametrize("limit", [1000, 30_000, 200_000])
    def test_really_full(self, model: Path, expected: bytes, tmp_path: Path, limit: int) -> None:
        """No file may grow beyond a limit: of the settings, of a block, of the output."""
        output = tmp_path / "out.gguf"

        def limited() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        status, said = in_child(["convert", str(model), "-o", str(output), *OPTIONS], limited)
        assert status == 1, said
        assert re.search("Error: can't write .*File too large", said), said
        assert "Traceback" not in said
        assert not output.exists()
        assert in_child(["convert", str(model), "-o", str(output), *OPTIONS])[0] == 0
        assert output.read_bytes() == expected

    def test_output_that_exists(self, d2q: Call, model: Path) -> None:
        Path("out.gguf").write_text("precious")
        said = refused(d2q("convert", model, "-o", "out.gguf", *OPTIONS))
        assert said.endswith("out.gguf exists already; use --force to replace it")
        assert Path("out.gguf").read_text() == "precious"

    def test_output_directory_that_does_not_exist(self, d2q: Call, model: Path) -> None:
        said = refused(d2q("convert", model, "-o", "absent/out.gguf", *OPTIONS))
        assert said.endswith("absent doesn't exist; create it first")

    def test_output_directory_that_is_not_writable(self, d2q: Call, model: Path) -> None:
        """Nobody may create files there, not even root."""
        assert "can't write /proc/out.gguf: " in refused(d2q("convert", model, "-o", "/proc/out.gguf", *OPTIONS))


class TestInterrupted:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("place", "name", "calls"),
        [
            (Checkpoint, "tensor", 1),
            (planning, "split_windows", 0),
            (solver, "quantize_layer", 2),
            (solver, "quantize_layer", 7),
            (QuantizedBlock, "apply", 5),
            (tensor_file, "save_file", 1),
            (WorkDir, "write_block", 2),
            (gguf_writer, "encode", 3),
            (WorkDir, "publish", 0),
            (WorkDir, "remove", 0),
        ],
        ids=[
            "checking",
            "calibration",
            "block 0",
            "block 1",
            "putting back",
            "saving",
            "end",
            "writing",
            "moving",
            "tidying",
        ],
    )
    def test_in_every_phase(self, d2q: Call, model: Path, expected: bytes, place: Any, name: str, calls: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            interrupt_after(patch, place, name, calls)
            result = d2q("convert", model, "-o", "out.gguf", *OPTIONS)
        assert result.code == 130
        assert result.err.endswith(INTERRUPTED)
        assert "Traceback" not in result.err
        assert d2q("convert", model, "-o", "out.gguf", *OPTIONS).code == 0
        assert Path("out.gguf").read_bytes() == expected
        assert left() == ["out.gguf"]

    @pytest.mark.slow
    def test_by_a_real_signal(self, model: Path, expected: bytes, tmp_path: Path) -> None:
        output = tmp_path / "out.gguf"
        block = tmp_path / "out.gguf.work" / "block-0000.safetensors"
        status, said = in_child(
            ["convert", str(model), "-o", str(output), *OPTIONS], signal_when=block.exists, signal_number=signal.SIGINT
        )
        assert status == 130, said
        assert said.endswith(INTERRUPTED)
        status, said = in_child(["convert", str(model), "-o", str(output), *OPTIONS])
        assert status == 0
        assert "resuming after" in said
        assert output.read_bytes() == expected


class TestCheckpoints:
    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({"hidden_size": 128}, "has the shape .*config.json implies"),
            ({"hidden_size": -64}, "hidden_size must be a whole number from 1"),
            ({"num_hidden_layers": 10**30}, "num_hidden_layers must be a whole number from 1 to 10000"),
            ({"num_hidden_layers": 3}, "has no tensor model.layers.2"),
            ({"vocab_size": 4100.5}, "vocab_size must be a whole number"),
            ({"vocab_size": "4100"}, "vocab_size must be a whole number"),
            ({"num_attention_heads": 0}, "num_attention_heads must be a whole number"),
            ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads"),
            ({"rms_norm_eps": -1e-5}, "rms_norm_eps must be a positive number"),
            ({"rope_theta": [10000.0]}, "rope_theta must be a positive number"),
            ({"rope_scaling": [[]]}, "rope_scaling|isn't supported"),
            ({"architectures": None}, "architecture"),
            ({"architectures": [["LlamaForCausalLM"]]}, "architecture"),
            ({"hidden_act": {"silu": True}}, "activation"),
            ({"max_position_embeddings": None}, "config.json has no max_position_embeddings"),
            ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
            ({"quantization_config": ["gptq"]}, "quantization_config must be an object"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_config_with_lies(
        self, d2q: Call, tmp_path: Path, model: Path, change: dict[str, Any], sentence: str
    ) -> None:
        lies = tmp_path / "model"
        lies.mkdir()
        for file in model.iterdir():
            os.link(file, lies / file.name)
        config = json.loads((model / "config.json").read_text())
        (lies / "config.json").unlink()
        (lies / "config.json").write_text(json.dumps({**config, **change}))
        said = refused(d2q("convert", lies, "-o", "out.gguf", *OPTIONS))
        assert re.search(sentence, said), said
        assert left() == []

    def test_truncated_shard(self, d2q: Call, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "model", "llama", shards=2, **SMALL)
        shard = tmp_path / "model" / "model-00002-of-00002.safetensors"
        shard.write_bytes(shard.read_bytes()[:-100])
        said = refused(d2q("convert", tmp_path / "model", "-o", "out.gguf", *OPTIONS))
        assert re.search("model-00002-of-00002.safetensors is truncated: 100 bytes .*; download it again", said)


class TestMalformedFiles:
    @pytest.mark.parametrize("arguments", [["eval"], ["inspect"], ["run", "-p", "x"]], ids=lambda value: value[0])
    @pytest.mark.parametrize("damage", ["empty", "cut", "noise", "scale", "absent"])
    def test_file(self, d2q: Call, expected: bytes, tmp_path: Path, arguments: list[str], damage: str) -> None:
        path = tmp_path / "x.gguf"
        if damage == "empty":
            path.touch()
        elif damage == "cut":
            path.write_bytes(expected[:-1000])
        elif damage == "noise":
            path.write_bytes(expected[:8] + b"\xa5" * 1000)
        elif damage == "scale":
            (tmp_path / "good.gguf").write_bytes(expected)
            info = gguf_info(tmp_path / "good.gguf")
            path.write_bytes(expected[: info.offset] + b"\x00\x7c" + expected[info.offset + 2 :])
        assert "x.gguf" in refused(d2q(*arguments, path))


def gguf_info(path: Path) -> TensorInfo:
    """The first tensor of one of our types."""
    return next(info for info in GGUFFile(path).tensors.values() if info.type_name.startswith("d2q"))


def in_child(
    arguments: list[str],
    prepare: Callable[[], None] = lambda: None,
    *,
    signal_when: Callable[[], bool] | None = None,
    signal_number: signal.Signals = signal.SIGINT,
) -> tuple[int, str]:
    """Run d2q-edge in a forked process, which has torch loaded; returns exit code and stderr."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 99
        try:
            torch.set_num_threads(1)
            os.dup2(writer, 2)
            os.close(reader)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            sys.stdout = sys.stderr
            sys.argv = ["d2q-edge", *arguments]
            signal.signal(signal.SIGINT, signal.default_int_handler)
            prepare()
            cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writer)
    if signal_when is not None:
        deadline = time.monotonic() + 120
        while not signal_when() and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(child, signal_number)
    with os.fdopen(reader, encoding="utf-8", errors="replace") as stream:
        said = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said
