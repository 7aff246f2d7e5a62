"""Converting a GGUF file gives what converting the checkpoint gives, to the byte, where the file has lost nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2q_edge.conversion import convert, plan
from d2q_edge.errors import D2QError
from d2q_edge.export.model_file import export, file_name
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from d2q_edge.options import Options
from d2q_edge.pipeline.recipe import fingerprint
from d2q_edge.runtime.llama_model import LlamaModel
from tests import stock
from tests.adapters import write_adapter
from tests.availability import require_runtime
from tests.command_line import Result
from tests.family_models import EXPERT_MODELS, MODELS, ROPE_MODELS, write_model
from tests.gguf_files import changed

ALL = (*MODELS, *EXPERT_MODELS, *ROPE_MODELS)
CARD = (
    "---\nlicense: mit\nbase_model: a/Some-Base-7B\ndatasets: [c/d]\ntags: [x, y]\nlanguage: [en, de]\n---\n# A model\n"
)


@pytest.mark.parametrize("name", ALL)
def test_without_calibration_and_in_a_stock_type(
    every_model: dict[str, Path], every_f32_file: dict[str, Path], tmp_path: Path, name: str
) -> None:
    written: dict[str, list[bytes]] = {}
    for source in (every_model[name], every_f32_file[name]):
        out = tmp_path / "out.gguf"
        convert(source, out, Options(calibrate=False), force=True, verify=False)
        written.setdefault("d2q2", []).append(out.read_bytes())
        export(source, out, "f16", force=True, verify=False)
        written.setdefault("f16", []).append(out.read_bytes())
    for kind, (expected, found) in written.items():
        assert found == expected, kind


@pytest.mark.parametrize("name", ["llama3", "phi3", "gemma3", "qwen3moe"])
def test_with_an_adapter(tmp_path: Path, name: str) -> None:
    """It is merged into the file's tensors by the names that the checkpoint has for them."""
    model, file = write_model(tmp_path / "model", name, dtype=torch.float32), tmp_path / "model.gguf"
    export(model, file, "f32", verify=False)
    layers = [each.removesuffix(".weight") for each in family_for(Checkpoint.open(model).config).linear_weights()]
    adapter = str(write_adapter(tmp_path / "adapter", model, layers))
    written = []
    for source, merged in ((model, adapter), (file, adapter), (file, None)):
        options = Options(calibrate=False, adapter=merged)
        convert(source, tmp_path / "out.gguf", options, force=True, verify=False)
        written.append(GGUFFile(tmp_path / "out.gguf"))
    expected, found, plain = written
    changed_tensors = {tensor for tensor in plain.tensors if not np.array_equal(found.raw(tensor), plain.raw(tensor))}
    assert changed_tensors == {tensor for tensor, info in plain.tensors.items() if info.type_name.startswith("d2q")}
    assert all(np.array_equal(found.raw(tensor), expected.raw(tensor)) for tensor in expected.tensors)
    assert list(found.kv) == list(expected.kv) and list(found.tensors) == list(expected.tensors)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [("llama3", {}), ("phi4-mini", {"bits": 3}), ("smollm2", {"rotation": "on"})],
)
def test_with_calibration(
    every_model: dict[str, Path], every_f32_file: dict[str, Path], tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    """The windows are cut with llama.cpp's tokens from the file, with transformers' from the checkpoint."""
    require_runtime()
    options = Options(**{"calibration_tokens": 1024, "context": 64, **changes})
    written = []
    for source in (every_model[name], every_f32_file[name]):
        convert(source, tmp_path / "out.gguf", options, force=True)
        written.append(GGUFFile(tmp_path / "out.gguf"))
    expected, found = written
    # A checkpoint's label counts the biases of norms; a file's is taken over.
    assert {key for key in expected.packed if found.packed[key] != expected.packed[key]} <= {"general.size_label"}
    assert list(found.kv) == list(expected.kv) and list(found.tensors) == list(expected.tensors)
    assert all(np.array_equal(found.raw(tensor), expected.raw(tensor)) for tensor in expected.tensors)


@pytest.mark.slow
def test_files_of_llama_cpps_converter(every_model: dict[str, Path], pristine_tree: Path, tmp_path: Path) -> None:
    """Its F32 file of every dense family, written again."""
    jobs = [(every_model[name], "f32", tmp_path / f"{name}.gguf") for name in MODELS]
    stock.convert(pristine_tree, "qwen2", jobs)
    for name in MODELS:
        export(tmp_path / f"{name}.gguf", tmp_path / "out.gguf", "f32", force=True)
        theirs, ours = GGUFFile(tmp_path / f"{name}.gguf"), GGUFFile(tmp_path / "out.gguf")
        assert ours.packed == theirs.packed
        assert ours.tensors.keys() == theirs.tensors.keys()
        assert all(np.array_equal(ours.raw(tensor), theirs.raw(tensor)) for tensor in ours.tensors)


def test_a_file_in_16_bits(every_model: dict[str, Path], tmp_path: Path) -> None:
    """From F16, the predictions differ by rounding only."""
    require_runtime()
    tokens = np.random.default_rng(0).integers(0, 4000, 100).astype(np.int32)
    export(every_model["llama3"], tmp_path / "f16.gguf", "f16", verify=False)
    logits = []
    for source in (every_model["llama3"], tmp_path / "f16.gguf"):
        convert(source, tmp_path / "out.gguf", Options(calibrate=False, bits=3), force=True, verify=False)
        with LlamaModel(tmp_path / "out.gguf", 100) as model:
            logits.append(torch.from_numpy(model.logits(tokens, 0).copy()).log_softmax(-1))
    expected, found = logits
    assert (expected.exp() * (expected - found)).sum(-1).mean() < 1e-3


def test_what_the_file_says_about_itself_stays(every_model: dict[str, Path], tmp_path: Path) -> None:
    model = tmp_path / "Nice-7B-Chat-v1.2"
    shutil.copytree(every_model["qwen2"], model)
    (model / "README.md").write_text(CARD)
    (model / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20}')
    source = tmp_path / "renamed.gguf"
    export(model, source, "f32", verify=False)
    changed(source, tmp_path / "x.gguf", {"general.quantized_by": "somebody", "general.foo": 1})
    for path in (source, tmp_path / "x.gguf"):
        convert(path, tmp_path / "out.gguf", Options(calibrate=False), force=True)
        found, expected = GGUFFile(tmp_path / "out.gguf").kv, GGUFFile(source).kv
        ours = {"general.file_type": 80, "general.quantized_by": found["general.quantized_by"]}
        general = {key: value for key, value in expected.items() if key.startswith("general.")}
        assert {key: value for key, value in found.items() if key.startswith("general.")} == general | ours
        assert found["general.quantized_by"].startswith("d2q-edge")
    assert found["general.base_model.0.repo_url"].endswith("a/Some-Base-7B")
    assert found["general.sampling.top_k"] == 20
    names = [
        file_name(checkpoint, family_for(checkpoint.config), "D2Q2")
        for checkpoint in map(Checkpoint.open, (model, source))
    ]
    assert names[0] == names[1] and "chat" in names[0].lower()


def test_a_file_without_a_name(every_f32_file: dict[str, Path], tmp_path: Path) -> None:
    keys = {
        key: None
        for key in GGUFFile(every_f32_file["qwen2"]).kv
        if key.startswith("general.") and key != "general.architecture"
    }
    path = changed(every_f32_file["qwen2"], tmp_path / "mine.gguf", keys)
    checkpoint = Checkpoint.open(path)
    assert file_name(checkpoint, family_for(checkpoint.config), "D2Q2").startswith("mine-")


def test_resuming_knows_the_file(every_f32_file: dict[str, Path], tmp_path: Path) -> None:
    """Unfinished work of another file isn't continued."""
    require_runtime()
    source = tmp_path / "in.gguf"
    keys = []
    for data in (every_f32_file["llama2"], every_f32_file["llama2"], every_f32_file["mistral"]):
        shutil.copy2(data, source)
        job = plan(source, tmp_path / "out.gguf", Options(calibration_tokens=256, context=64))
        assert job.calibration is not None
        windows = job.calibration.windows.calibration
        keys.append(fingerprint(job.checkpoint, job.types, job.file.metadata, windows, job.processes))
    assert keys[0] == keys[1] != keys[2]
    assert keys[0]["weight files"] != keys[2]["weight files"]


def test_on_the_command_line(d2q: Callable[..., Result], every_f32_file: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "source.gguf"
    shutil.copy(every_f32_file["qwen3"], source)
    result = d2q("convert", source, "--no-calibration")
    assert result.code == 0, result.err
    assert list(Path.cwd().glob("*-D2Q2.gguf"))
    for options in (("--no-calibration",), ("--type", "q8_0")):
        result = d2q("convert", source, "-o", source, "--force", *options)
        assert result.code == 1
        assert "source.gguf, belongs to the model and won't be replaced" in result.err
    result = d2q("convert", source, "--type", "q4_0", "-o", "q4.gguf", "--pre-tokenizer", "qwen2")
    assert result.code == 1 and "--pre-tokenizer has no meaning for" in result.err
    assert d2q("convert", source, "--type", "q4_0", "-o", "q4.gguf").code == 0
    result = d2q("convert", "q4.gguf", "--no-calibration", "-o", "out.gguf")
    assert result.code == 0 and "q4.gguf is quantized (q4_0): what that has lost stays lost" in result.err


def test_calibration_needs_the_runtime(every_f32_file: dict[str, Path], tmp_path: Path, no_runtime: None) -> None:
    with pytest.raises(D2QError, match=r"only llama.cpp has the tokenizer of .*d2q-edge runtime install"):
        convert(every_f32_file["qwen3"], tmp_path / "out.gguf", Options(calibration_tokens=256, context=64))
