"""Every family in a stock type: the file of llama.cpp's own converter, and transformers' logits in llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM

from d2q_edge.conversion import convert
from d2q_edge.export.model_file import FILE_TYPES, export, model_tensors, model_tokenizer, write_model
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.formats.gguf_writer import GGUFTensor
from d2q_edge.model.blocks import add_bias
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from d2q_edge.options import Options
from d2q_edge.runtime.llama_model import LlamaModel
from tests import stock
from tests.availability import require_runtime
from tests.family_models import MODELS
from tests.family_models import write_model as write_random_model

F32 = npt.NDArray[np.float32]
WINDOW_IGNORED = ("mistral-window", "phi3")
"""Models with a sliding window that llama.cpp doesn't have."""
BIASED = (
    "llama3",
    "mistral",
    "ministral3",
    "qwen2",
    "qwen3",
    "smollm3",
    "gemma3",
    "gemma4",
    "gemma4-e",
    "phi4-mini",
    "olmo3",
    "granite",
    "ernie4_5",
    "lfm2",
    "qwen3.5",
)
"""One or two variants of every llama.cpp architecture."""
TOKENS = np.random.default_rng(0).integers(0, 4000, 300).astype(np.int32)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tests must not change them. llama.cpp has rules for models by their names, which the directories decide."""
    directory = tmp_path_factory.mktemp("models")
    float32 = ("gemma3-linear", "mistral")
    dtypes = {name: torch.float32 if name in float32 else torch.bfloat16 for name in MODELS}
    return {name: write_random_model(directory / name / "tiny", name, dtype=dtypes[name]) for name in MODELS}


@pytest.fixture(scope="module")
def stock_files(
    models: dict[str, Path], pristine_tree: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("stock")
    files = {name: directory / f"{name}.gguf" for name in models}
    stock.convert(pristine_tree, "qwen2", [(models[name], "f16", file) for name, file in files.items()])
    return files


def original_logits(model: Path, tokens: npt.NDArray[np.int32], biases: Mapping[str, F32] | None = None) -> F32:
    """transformers', in float32, with biases added to the outputs of some norms."""
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for name, bias in (biases or {}).items():
        add_bias(module.get_submodule(name), torch.from_numpy(bias))
    with torch.inference_mode():
        logits: F32 = module(torch.from_numpy(tokens).long()[None], use_cache=False).logits[0].numpy()
    return logits


@contextmanager
def loaded(path: Path, tokens: int) -> Iterator[LlamaModel]:
    require_runtime()
    with LlamaModel(path, tokens) as model:
        yield model


def llama_logits(path: Path, tokens: npt.NDArray[np.int32]) -> F32:
    with loaded(path, len(tokens)) as model:
        return model.logits(tokens, 0).copy()


def error(actual: F32, expected: F32) -> float:
    """Root mean square of the worst token, relative to that of all."""
    return float(np.sqrt(np.square(actual - expected).mean(1).max() / np.square(expected).mean()))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_file_is_the_stock_converters(
    models: dict[str, Path], stock_files: dict[str, Path], tmp_path: Path, name: str
) -> None:
    export(models[name], tmp_path / "ours.gguf", "f16")
    ours, theirs = GGUFFile(tmp_path / "ours.gguf"), GGUFFile(stock_files[name])
    assert ours.kv == theirs.kv
    assert list(ours.tensors) == list(theirs.tensors)
    for tensor, info in ours.tensors.items():
        assert (info.shape, info.type_name) == (theirs.tensors[tensor].shape, theirs.tensors[tensor].type_name), tensor
        assert np.array_equal(ours.raw(tensor), theirs.raw(tensor)), tensor
    # The converter writes one key of these before or after all others.
    if name not in ("phi4-mini", "ernie4_5"):
        assert (tmp_path / "ours.gguf").read_bytes() == stock_files[name].read_bytes()


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    """With 200 tokens, more than any sliding window; with 300, more than Phi-4-mini's original context."""
    export(models[name], tmp_path / "out.gguf", "f32")
    for count in (200, 300) if name == "phi4-mini" else (200,):
        tokens = TOKENS[:count]
        expected, actual = original_logits(models[name], tokens), llama_logits(tmp_path / "out.gguf", tokens)
        if name in WINDOW_IGNORED:
            assert error(actual, expected) > 0.3
            actual, expected = actual[:64], expected[:64]
        # llama.cpp keeps keys and values in 16 bits.
        assert error(actual, expected) < 0.01


@pytest.mark.parametrize("name", MODELS)
def test_notes_say_where_llama_cpp_differs(models: dict[str, Path], name: str) -> None:
    notes = family_for(Checkpoint.open(models[name]).config).notes
    if name in WINDOW_IGNORED:
        assert [note.startswith("the model attends to the last 64 tokens, llama.cpp's") for note in notes] == [True]
    else:
        assert notes == ()


def test_notes_are_told(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, count in (("mistral-window", 1), ("mistral", 0)):
        export(models[name], tmp_path / f"{name}.gguf", "f16")
        assert capsys.readouterr().err.count("it isn't the same model\n") == count
        convert(models[name], tmp_path / "unused.gguf", Options(calibrate=False), dry_run=True)
        assert capsys.readouterr().err.count("it isn't the same model\n") == count


@pytest.mark.parametrize("name", BIASED)
def test_norm_biases_are_added_to_the_norms_outputs(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    checkpoint = Checkpoint.open(models[name])
    family = family_for(checkpoint.config)
    rng = np.random.default_rng(1)
    norms = [group.norm for group in family.block_groups(0) if group.norm is not None]
    names = [f"{family.block_prefix(index)}{norm}" for index in range(family.num_layers) for norm in norms]
    names.append(family.final_norm)
    biases = {norm: rng.standard_normal(64).astype(np.float32) * 0.3 for norm in names}

    def load(norm: str) -> Callable[[], npt.NDArray[Any]]:
        return lambda: biases[norm]

    extra = [GGUFTensor(family.gguf_name(f"{norm}.bias"), (64,), "f32", load(norm)) for norm in biases]
    inner = {"attn_norm", "post_attention_norm" if name == "qwen3.5" else "ffn_norm"} if norms else set()
    last = "token_embd_norm" if name == "lfm2" else "output_norm"
    assert {tensor.name.split(".")[-2] for tensor in extra} == {*inner, last}
    path = tmp_path / "out.gguf"
    tensors = [*model_tensors(checkpoint, family, "f32"), *extra]
    write_model(path, checkpoint, family, model_tokenizer(checkpoint, family), tensors, file_type=FILE_TYPES["f32"])
    tokens = TOKENS[:40]
    actual = llama_logits(path, tokens)
    assert error(actual, original_logits(models[name], tokens, biases)) < 0.01
    for norm in dict.fromkeys((*names[:2], family.final_norm)):
        fewer = {other: bias for other, bias in biases.items() if other != norm}
        assert error(actual, original_logits(models[name], tokens, fewer)) > 0.03
