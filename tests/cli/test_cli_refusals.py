"""What the command line refuses, in one sentence and before any work: no file is left."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import EXAMPLE
from tests.command_line import Call, refused

Make = Callable[..., Path]
QUICK = ("--calibration-tokens", "512", "--context", "32")


class TestBadModels:
    @pytest.mark.parametrize("options", [QUICK, ("--no-calibration",), ("--type", "f16"), ("--dry-run",)], ids=str)
    def test_missing_directory(
        self, d2q: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
    ) -> None:
        refused(d2q("convert", tmp_path / "none", "-o", "out.gguf", *options), "there is no directory")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        refused(d2q("convert", "someone/model", *options), "someone/model")

    def test_file_instead_of_directory(self, d2q: Call) -> None:
        refused(d2q("convert", EXAMPLE / "config.json", "-o", "out.gguf"), "is not a directory")

    def test_missing_shard(self, d2q: Call, make_checkpoint: Make) -> None:
        model = make_checkpoint(shards=3)
        (model / "model-00002-of-00003.safetensors").unlink()
        refused(d2q("convert", model, "-o", "out.gguf", *QUICK), "lacks model-00002-of-00003.safetensors")

    def test_truncated_weights(self, d2q: Call, make_checkpoint: Make) -> None:
        file = make_checkpoint() / "model.safetensors"
        content = file.read_bytes()
        for size in (len(content) - 1, len(content) // 2, 1000, 4, 0):
            file.write_bytes(content[:size])
            refused(d2q("convert", file.parent, "-o", "out.gguf", *QUICK), "model.safetensors is truncated")

    def test_unsupported_architecture(self, d2q: Call, make_checkpoint: Make) -> None:
        model = make_checkpoint()
        config = json.loads((model / "config.json").read_text())
        config |= {"architectures": ["MambaForCausalLM"], "model_type": "mamba"}
        (model / "config.json").write_text(json.dumps(config))
        refused(d2q("convert", model, "-o", "out.gguf", *QUICK), "MambaForCausalLM")

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    @pytest.mark.parametrize("options", [QUICK, ("--no-calibration",), ("--type", "f16")], ids=str)
    def test_nan_weights(self, d2q: Call, make_checkpoint: Make, options: tuple[str, ...], value: float) -> None:
        model = make_checkpoint(intermediate_size=128)
        tensors = load_file(model / "model.safetensors")
        tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = value
        save_file(tensors, model / "model.safetensors")
        result = d2q("convert", model, "-o", "out.gguf", *options)
        refused(result, "tensor model.layers.1.mlp.down_proj.weight", "contains NaN or infinite values")

    def test_empty_config(self, d2q: Call, make_checkpoint: Make) -> None:
        model = make_checkpoint()
        (model / "config.json").write_text("")
        refused(d2q("convert", model, "-o", "out.gguf", *QUICK), "config.json isn't valid JSON")

    def test_missing_tokenizer(self, d2q: Call, make_checkpoint: Make) -> None:
        model = make_checkpoint()
        (model / "tokenizer.json").unlink()
        refused(d2q("convert", model, "-o", "out.gguf", *QUICK), "has no tokenizer.json")


class TestBadOutputs:
    @pytest.mark.parametrize("options", [QUICK, ("--no-calibration",), ("--type", "f16")], ids=str)
    @pytest.mark.parametrize(
        ("output", "said"),
        [
            ("none/out.gguf", "the output directory none doesn't exist; create it first"),
            (EXAMPLE / "config.json" / "out.gguf", "can't write|doesn't exist"),
            (".", "is a directory"),
            pytest.param(
                "/proc/out.gguf",
                "can't write /proc/out.gguf",
                marks=pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc"),
            ),
        ],
    )
    def test_unwritable(self, d2q: Call, output: str | Path, said: str, options: tuple[str, ...]) -> None:
        result = d2q("convert", EXAMPLE, "-o", output, *options)
        refused(result)
        assert any(part in result.err for part in said.split("|")), result.err

    def test_existing(self, d2q: Call, tmp_path: Path) -> None:
        output = tmp_path / "out.gguf"
        output.write_text("old")
        for options in (QUICK, ("--no-calibration",), ("--type", "f16")):
            refused(d2q("convert", EXAMPLE, "-o", output, *options), "exists already; use --force to replace it")
        assert output.read_text() == "old"
        assert d2q("convert", EXAMPLE, "-o", output, "--type", "f16", "--force").code == 0
        assert output.read_bytes()[:4] == b"GGUF"

    def test_unwritable_report_is_found_first(self, d2q: Call) -> None:
        refused(d2q("convert", EXAMPLE, "-o", "out.gguf", "--report", "none/r.json"), "none doesn't exist")


class TestBadOptions:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (("--bits", "2.3"), "--bits 2.3 is out of range; use 2, 3, or a number from 2.31 to 4.3"),
            (("--bits", "4.5"), "use 2, 3, or a number from 2.31 to 4.3"),
            (("--bits", "nan"), "use 2, 3, or a number from 2.31 to 4.3"),
            (("--refine", "--no-calibration"), "--refine tunes the model on calibration text"),
            (("--bits", "2.6", "--no-calibration"), "measures on calibration text which layers need more bits"),
            (("--embedding-type", "q2_k"), "--embedding-type 'q2_k' isn't a stock type"),
            (("--head-type", "f16"), "(tied); use --embedding-type alone"),
            (("--type", "q2_k"), "'q2_k' isn't a stock type that can be written"),
            (("--calibration", "none.txt"), "can't read the text none.txt"),
            (("--calibration", str(EXAMPLE / "model.safetensors")), "is not UTF-8"),
            (("--calibration", os.devnull), "is empty"),
            (("--context", "2049"), "--context 2049 is more than the 2048 tokens that the model was made for"),
        ],
    )
    def test_request_that_cannot_be_carried_out(self, d2q: Call, options: tuple[str, ...], said: str) -> None:
        refused(d2q("convert", EXAMPLE, "-o", "out.gguf", *options), said)

    @pytest.mark.parametrize(
        ("choice", "ignored"),
        [
            (("--type", "f16"), ("--calibration", "none.txt")),
            (("--type", "f16"), ("--calibration-tokens", "9")),
            (("--type", "f16"), ("--context", "9")),
            (("--type", "f16"), ("--seed", "1")),
            (("--type", "f16"), ("--no-dsq",)),
            (("--type", "f16"), ("--dac",)),
            (("--type", "f16"), ("--gpus", "2")),
            (("--type", "f16"), ("--rotation", "off")),
            (("--no-calibration",), ("--calibration", "none.txt")),
            (("--no-calibration",), ("--calibration-tokens", "9")),
            (("--no-calibration",), ("--context", "9")),
            (("--no-calibration",), ("--no-dac",)),
        ],
    )
    def test_option_that_would_be_ignored(self, d2q: Call, choice: tuple[str, ...], ignored: tuple[str, ...]) -> None:
        result = d2q("convert", EXAMPLE, "-o", "out.gguf", *choice, *ignored)
        assert result.code == 2
        assert result.err.splitlines()[-1].startswith(f"Error: {choice[0]} ")
        assert result.err.endswith(f"; it can't be used with {ignored[0]}\n")
        assert list(Path.cwd().iterdir()) == []

    @pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
    def test_missing_device(self, d2q: Call) -> None:
        refused(d2q("convert", EXAMPLE, "-o", "out.gguf", "--device", "cuda"), "no cuda device; use --device cpu")

    @pytest.mark.parametrize(
        "arguments",
        [
            (),
            ("unknown",),
            ("convert",),
            ("convert", "a", "b"),
            ("convert", EXAMPLE, "--bits", "two"),
            ("convert", EXAMPLE, "--rotation", "maybe"),
            ("convert", EXAMPLE, "--calibration-tokens", "0"),
            ("convert", EXAMPLE, "--device", "tpu"),
            ("convert", EXAMPLE, "--type", "f16", "--bits", "2"),
            ("convert", EXAMPLE, "--type", "f16", "--dry-run"),
            ("convert", EXAMPLE, "--type", "f16", "--embedding-type", "q8_0"),
            ("convert", EXAMPLE, "--type", "f16", "--no-calibration"),
            ("convert", EXAMPLE, "--type", "f16", "--rotation", "on"),
            ("convert", EXAMPLE, "--memory-limit", "nan"),
            ("convert", EXAMPLE, "--memory-limit", "inf"),
            ("eval",),
            ("eval", "a.gguf", "--chunks", "0"),
            ("bench", "a.gguf", "--threads", "513"),
            ("run", "a.gguf", "-p", "x", "--threads", "513"),
            ("run", "a.gguf", "-p", "x", "--temperature", "nan"),
            ("run", "a.gguf", "-p", "x", "--context", "1"),
            ("run", "a.gguf", "-p", "x", "--top-p", "1.1"),
            ("run", "a.gguf", "-p", "x", "--top-p", "nan"),
            ("run", "a.gguf", "-p", "x", "--min-p", "-0.1"),
            ("run", "a.gguf", "-p", "x", "--top-k", "-1"),
            ("chat", "a.gguf", "--repeat-penalty", "0"),
            ("chat", "a.gguf", "--repeat-penalty", "inf"),
            ("chat", "a.gguf", "--cache-type-k", "q2_k"),
            ("eval", "a.gguf", "--reference-lora", "b.gguf"),
            ("compare",),
            ("compare", "a.gguf", "b.gguf", "--rounds", "0"),
            ("run", "a.gguf"),
            ("runtime", "info", "--unknown"),
        ],
        ids=lambda arguments: " ".join(map(str, arguments)).replace(str(EXAMPLE), "MODEL"),
    )
    def test_wrong_usage(self, d2q: Call, arguments: tuple[object, ...]) -> None:
        result = d2q(*arguments)
        assert result.code == 2
        assert "Usage: " in result.err
        assert "Traceback" not in result.err
        assert list(Path.cwd().iterdir()) == []
