"""Quantized checkpoints and adapters convert to the file of the ordinary checkpoint that they stand for."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from d2q_edge import conversion
from d2q_edge.errors import D2QError
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.model.adapted_checkpoint import adapted
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.options import Options
from d2q_edge.pipeline.work_dir import WorkDir
from tests.adapters import PREFIX, rewrite_adapter, write_adapter
from tests.checkpoints import write_checkpoint
from tests.command_line import Result
from tests.interruption import interrupted
from tests.quantized_checkpoints import quantize

Make = Callable[..., Path]
QUICK = Options(calibration_tokens=512, context=32)
Q = "model.layers.0.self_attn.q_proj"


def write_plain(directory: Path, model: Path, adapter: Path | None = None) -> Path:
    """Write what a checkpoint's tensors stand for as an ordinary one."""
    checkpoint = adapted(Checkpoint.open(model), None if adapter is None else str(adapter))
    directory.mkdir()
    for file in model.glob("tokenizer*"):
        (directory / file.name).write_bytes(file.read_bytes())
    (directory / "config.json").write_text(json.dumps(checkpoint.config))
    save_file({name: checkpoint.tensor(name) for name in checkpoint.names}, directory / "model.safetensors")
    return directory


def same_tensors(first: Path, second: Path) -> bool:
    files = GGUFFile(first), GGUFFile(second)
    assert files[0].tensors.keys() == files[1].tensors.keys()
    return all(np.array_equal(files[0].raw(name), files[1].raw(name)) for name in files[0].tensors)


@pytest.mark.parametrize("kind", ["fp8-blocks", "gptq-shuffled", "ct-int4", "adapter"])
@pytest.mark.parametrize("calibrate", [False, True])
def test_the_same_file(tmp_path: Path, kind: str, calibrate: bool) -> None:
    model, adapter = tmp_path / "model", None
    write_checkpoint(
        model, "qwen3", hidden_size=192, intermediate_size=320, num_hidden_layers=1, tie_word_embeddings=True
    )
    if kind == "adapter":
        adapter = write_adapter(tmp_path / "adapter", model, [Q, "lm_head"])
    else:
        quantize(model, kind)
    plain = write_plain(tmp_path / "plain", model, adapter)
    options = replace(QUICK, calibrate=calibrate)
    conversion.convert(plain, tmp_path / "plain.gguf", options, verify=False)
    own = replace(options, adapter=None if adapter is None else str(adapter))
    conversion.convert(model, tmp_path / "out.gguf", own, verify=False)
    assert same_tensors(tmp_path / "out.gguf", tmp_path / "plain.gguf")
    assert ("output.weight" in GGUFFile(tmp_path / "out.gguf").tensors) == (kind == "adapter")


def test_adapters_on_the_command_line(d2q: Callable[..., Result], make_checkpoint: Make, tmp_path: Path) -> None:
    model = make_checkpoint("qwen2", dtype=torch.float32)
    adapter = write_adapter(tmp_path / "adapter", model, [Q])
    plain = write_plain(tmp_path / "plain", model, adapter)
    (adapter / "tokenizer.json").write_text("{}")
    for options in (("--type", "f16"), ("--no-calibration",)):
        result = d2q("convert", model, "-o", "out.gguf", "--adapter", adapter, "--force", *options)
        assert result.code == 0
        assert "adapter, which was trained on tiny-org/base, changes 1 tensors" in result.err
        assert f"the tokenizer is the model's; that in {adapter} is not read" in result.err
        assert d2q("convert", plain, "-o", "plain.gguf", "--force", *options).code == 0
        assert same_tensors(Path("out.gguf"), Path("plain.gguf"))
    recipe = json.loads(str(GGUFFile(Path("out.gguf")).kv["d2q.recipe"]))
    assert len(recipe["adapter_sha256"]) == 64
    assert "adapter_sha256" not in json.loads(str(GGUFFile(Path("plain.gguf")).kv["d2q.recipe"]))


@pytest.mark.parametrize("options", [("--no-calibration",), ("--type", "f16")], ids=str)
def test_an_adapter_is_not_overwritten(
    d2q: Callable[..., Result], make_checkpoint: Make, tmp_path: Path, options: tuple[str, ...]
) -> None:
    model = make_checkpoint()
    adapter = write_adapter(tmp_path / "adapter", model, [Q])
    for file in adapter.iterdir():
        content = file.read_bytes()
        result = d2q("convert", model, "-o", file, "--adapter", adapter, "--force", *options)
        assert result.code == 1 and "belongs to what is read and won't be replaced" in result.err
        assert file.read_bytes() == content
    if "--type" not in options:
        command = ("convert", model, "-o", "out.gguf", "--adapter", adapter, "--force", *options)
        result = d2q(*command, "--report", adapter / "adapter_config.json")
        assert result.code == 1 and "belongs to what is read" in result.err


def test_an_interrupted_conversion_is_for_one_adapter(make_checkpoint: Make, tmp_path: Path) -> None:
    model = make_checkpoint()
    adapter = write_adapter(tmp_path / "adapter", model, [Q])
    output, options = tmp_path / "out.gguf", replace(QUICK, adapter=str(adapter))
    with interrupted(WorkDir, "write_block", 1):
        conversion.convert(model, output, options, verify=False)
    original = (adapter / "adapter_model.safetensors").read_bytes()
    rewrite_adapter(adapter, lambda tensors: tensors[f"{PREFIX}{Q}.lora_A.weight"].mul_(2))
    for other in (options, QUICK):
        with pytest.raises(D2QError, match="holds an unfinished conversion with another recipe"):
            conversion.convert(model, output, other, verify=False)
    (adapter / "adapter_model.safetensors").write_bytes(original)
    conversion.convert(model, output, options, verify=False)
    conversion.convert(model, tmp_path / "whole.gguf", options, verify=False)
    assert output.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
