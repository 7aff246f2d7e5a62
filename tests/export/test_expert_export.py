"""Files of models with experts: llama.cpp's own converter, transformers' logits, stacks, sizes of real models."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from d2q_edge.conversion import convert
from d2q_edge.export.model_file import export, file_name, model_tensors, model_tokenizer
from d2q_edge.formats import tensor_types
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.formats.gguf_writer import GGUFTensor, block_and_type_size, data_size, encode
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from d2q_edge.model.weight_files import TensorEntry
from d2q_edge.options import Options
from d2q_edge.pipeline.output import Output
from d2q_edge.pipeline.type_plan import plan_types
from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.rtn import round_layer
from d2q_edge.runtime.llama_model import LlamaModel
from tests.availability import require_runtime
from tests.checkpoints import EXAMPLE
from tests.export.test_model_file import README, compare
from tests.model.test_expert_families import REAL
from tools.whole_model import WholeModel

Make = Callable[..., Path]
Convert = Callable[[Path, str, str], Path]
TOKENS = np.random.default_rng(2).integers(0, 4000, 48).astype(np.int32)


def file_logits(path: Path, tokens: int = len(TOKENS)) -> torch.Tensor:
    with LlamaModel(path, context=64, threads=1) as model:
        return torch.from_numpy(model.logits(TOKENS[:tokens], 0).copy())


def log_probabilities(checkpoint: Checkpoint, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    model = WholeModel(checkpoint, family_for(checkpoint.config), weights, torch.device("cpu"))
    return model.log_probabilities(model.states(torch.from_numpy(TOKENS.astype(np.int64))[None]))[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "type_name", "options"),
    [
        ("qwen3moe", "f16", {"shards": 3}),
        ("qwen3moe", "q8_0", {"head_dim": None, "dtype": torch.float32, "moe_intermediate_size": 72}),
        ("olmoe", "bf16", {"dtype": torch.float16, "shards": 2, "num_key_value_heads": None}),
    ],
)
def test_like_stock(
    make_checkpoint: Make,
    stock_convert: Convert,
    tmp_path: Path,
    family: str,
    type_name: str,
    options: dict[str, Any],
) -> None:
    model = make_checkpoint(family, name="tiny-7b-chat-v1.1", **options)
    (model / "README.md").write_text(README)
    settings = json.loads((model / "config.json").read_text())
    present = {key: value for key, value in settings.items() if value is not None}
    (model / "config.json").write_text(json.dumps(present))
    export(model, tmp_path / "ours.gguf", type_name)
    compare(tmp_path / "ours.gguf", stock_convert(model, type_name, "qwen2"))


def test_what_a_file_holds(make_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_checkpoint("qwen3moe")
    export(model, tmp_path / "out.gguf", "q8_0")
    assert "matrices become" not in capsys.readouterr().err, "routers are f32 by design, which is nothing to report"
    file, checkpoint = GGUFFile(tmp_path / "out.gguf"), Checkpoint.open(model)
    assert file.tensors["blk.1.ffn_gate_exps.weight"].shape == (8, 64, 64)
    assert file.tensors["blk.1.ffn_gate_inp.weight"].type_name == "f32"
    assert file.kv["qwen3moe.expert_count"] == 8
    assert file.kv["qwen3moe.expert_used_count"] == 2
    assert file.kv["qwen3moe.expert_feed_forward_length"] == 64
    for part, stack in (("gate", "gate"), ("up", "up"), ("down", "down")):
        for number in range(8):
            expected = checkpoint.tensor(f"model.layers.1.mlp.experts.{number}.{part}_proj.weight").float().numpy()
            found = file.dequantize(f"blk.1.ffn_{stack}_exps.weight")[number]
            np.testing.assert_allclose(found, expected, atol=2e-3)
    assert file.kv["general.size_label"] in file_name(checkpoint, family_for(checkpoint.config), "D2Q2")


class NotingCheckpoint(Checkpoint):
    """A checkpoint that notes what is loaded."""

    loaded: ClassVar[list[str]] = []

    def tensor(self, name: str) -> torch.Tensor:
        self.loaded.append(name)
        return super().tensor(name)


def test_a_stack_is_loaded_part_by_part(make_checkpoint: Make) -> None:
    """At no time is more than one expert in memory."""
    checkpoint = NotingCheckpoint.open(make_checkpoint("olmoe"))
    tensors = model_tensors(checkpoint, family_for(checkpoint.config), "f16")
    (down,) = (tensor for tensor in tensors if tensor.name == "blk.0.ffn_down_exps.weight")
    assert len(down.parts) == 6
    down.parts[4].load()
    assert NotingCheckpoint.loaded == ["model.layers.0.mlp.experts.4.down_proj.weight"]
    whole, part = encode(down).view(np.float16), encode(down.parts[4])
    np.testing.assert_array_equal(whole[4], part)
    assert part.any()


def test_stacks_of_different_tensors_are_refused() -> None:
    part = GGUFTensor("a", (2, 32), "f32", lambda: np.zeros((2, 32), np.float32))
    assert GGUFTensor.stack("x", [part, part]).nbytes == 2 * part.nbytes
    for other in (GGUFTensor("b", (2, 64), "f32", part.load), GGUFTensor("b", (2, 32), "f16", part.load)):
        with pytest.raises(ValueError, match="x: the parts of a stack must be of one shape and type"):
            GGUFTensor.stack("x", [part, other])
    with pytest.raises(ValueError, match="of one shape"):
        GGUFTensor.stack("x", [])


@pytest.mark.parametrize("family", ["qwen3moe", "olmoe"])
@torch.inference_mode()
def test_logits_like_transformers(make_checkpoint: Make, tmp_path: Path, family: str) -> None:
    require_runtime()
    model = make_checkpoint(family)
    export(model, tmp_path / "out.gguf", "f32")
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    expected = whole(torch.from_numpy(TOKENS.astype(np.int64))[None]).logits[0]
    difference = (file_logits(tmp_path / "out.gguf") - expected).abs().amax(1)
    # llama.cpp keeps keys and values in f16; a token may take another expert for that, hence the median.
    assert difference.median() < 0.005 * expected.std()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("qwen3moe", {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 4}),
        ("olmoe", {"hidden_size": 128, "intermediate_size": 64}),
    ],
    ids=["blocks of 256", "blocks of 64"],
)
@torch.inference_mode()
def test_rounded_files(make_checkpoint: Make, tmp_path: Path, family: str, config: dict[str, Any]) -> None:
    """Without calibration: every expert is where it belongs, and llama.cpp computes with it what torch does."""
    require_runtime()
    model, out = make_checkpoint(family, dtype=torch.float32, **config), tmp_path / "out.gguf"
    options = Options(calibrate=False, embedding_type="q8_0", head_type="q8_0")
    planned = convert(model, out, options, dry_run=True)
    done = convert(model, out, options)
    assert planned.size == done.size == out.stat().st_size
    file, checkpoint = GGUFFile(out), Checkpoint.open(model)
    bound = family_for(checkpoint.config)
    weights: dict[str, torch.Tensor] = {}
    dequantized = {name: file.dequantize(name) for name in file.tensors}
    for name, kind in done.types.linears.items():
        search = CodebookSearch(tensor_types.BY_NAME[kind], torch.device("cpu"))
        rounded = round_layer(checkpoint.tensor(name), search).weights.numpy()
        found = dequantized[bound.gguf_name(name)]
        if "experts" in name:
            assert found.shape[0] == bound.num_experts
            found = found[int(name.split(".")[5])]
        np.testing.assert_allclose(found, rounded, rtol=1e-3, atol=1e-6)
        weights[name] = torch.from_numpy(found)
    for table in done.types.tables:
        weights[table] = torch.from_numpy(dequantized[bound.gguf_name(table)])
    original, expected = log_probabilities(checkpoint, {}), log_probabilities(checkpoint, weights)
    divergences = (expected.exp() * (expected - file_logits(out).log_softmax(-1))).sum(-1)
    # llama.cpp rounds activations to 8 bits; a token may take another expert for that, hence the median.
    assert divergences.median() < 5e-4
    assert (expected.exp() * (expected - original)).sum(-1).median() > 100 * divergences.median()
    # A token by itself, as in generating text, goes through other kernels.
    alone = file_logits(out, 1).log_softmax(-1)
    assert (expected[:1].exp() * (expected[:1] - alone)).sum() < 5e-4


@pytest.mark.parametrize("name", REAL)
@pytest.mark.slow
def test_sizes_of_real_models_without_their_weights(name: str, tmp_path: Path) -> None:
    """The file's size from config and shapes alone, against bits counted by hand."""
    config = REAL[name]
    family = family_for(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((EXAMPLE / file).read_bytes())
    entries = {
        tensor: TensorEntry(tmp_path, tensor, "BF16", shape) for tensor, shape in sorted(family.tensor_shapes().items())
    }
    checkpoint = Checkpoint(tmp_path, dict(config), entries)
    checkpoint.check(family.tensor_shapes())
    plan = plan_types(family, 2)
    output = Output(checkpoint, family, model_tokenizer(checkpoint, family), plan, [], {}, 80)
    tensors = output._tensors(None)
    assert len(tensors) == {"Qwen3-30B-A3B": 3 + 48 * 12, "OLMoE-1B-7B-0924": 3 + 16 * 12}[name]
    hidden, experts, blocks = config["hidden_size"], config["num_experts"], config["num_hidden_layers"]
    floats = hidden * (1 + blocks * (2 + experts)) * 4
    heads = {"Qwen3-30B-A3B": 2 * 128, "OLMoE-1B-7B-0924": 2 * 2048}[name] * blocks * 4
    linears = sum(math.prod(family.tensor_shapes()[weight]) for weight in family.linear_weights()) // 256 * 74
    tables = config["vocab_size"] * hidden // 256 * (block_and_type_size("q4_k")[1] + block_and_type_size("q5_k")[1])
    assert data_size(tensors) == floats + heads + linears + tables
    assert 0 < output.size() - data_size(tensors) < 6_000_000, "keys and tokenizer"
    assert plan.linear_bits_per_weight == 2.3125
