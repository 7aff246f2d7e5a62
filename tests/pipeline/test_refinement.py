"""Refining what the pipeline left: the same model before and after, everything that may move, and nothing else."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from d2q_edge.distributed.process_group import SINGLE_PROCESS
from d2q_edge.errors import D2QError
from d2q_edge.formats import tensor_types
from d2q_edge.formats.quantized_block import QuantizedWeight
from d2q_edge.model.blocks import BlockRunner
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from d2q_edge.options import Options
from d2q_edge.pipeline import refinement
from d2q_edge.pipeline.block_loop import quantize_blocks
from d2q_edge.pipeline.refinement import (
    Refinement,
    TunableModel,
    choose_scope,
    model_bytes,
    original_states,
    refine,
    refined_norms,
)
from d2q_edge.pipeline.type_plan import plan_types
from d2q_edge.pipeline.work_dir import WorkDir
from d2q_edge.quantize.refine import Schedule
from tests.blocks import assert_same_block, changed_tensors, finished_blocks, model_tensors
from tests.checkpoints import write_checkpoint
from tools.random_model import GEOMETRIES
from tools.whole_model import WholeModel

CPU = torch.device("cpu")
WINDOWS = np.random.default_rng(4).integers(0, 300, (9, 24))
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # With biases, and a head that has a column scale.
    "untied": ("qwen2", {"hidden_size": 64, "intermediate_size": 128}),
    # With norms of queries and keys, and down projections that are q4_0.
    "tied": ("qwen3", {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": True}),
}


class Finished:
    """A quantized model, not refined, and what it is made of."""

    def __init__(self, directory: Path, name: str) -> None:
        family, options = MODELS[name]
        write_checkpoint(directory / name, family, vocab_size=300, **options)
        self.checkpoint = Checkpoint.open(directory / name)
        self.family = family_for(self.checkpoint.config)
        self.types = plan_types(self.family, 2).linears
        self.work = WorkDir(directory / "first.gguf", {})
        runner = BlockRunner(self.checkpoint, self.family, CPU)
        quantize_blocks(runner, self.types, WINDOWS, self.work, Options(guidance=False))
        # So that there is something to gain: logits that are too large, and a bias.
        last = self.work.read_block(2)
        norm = last.floats.get("model.norm.weight", self.checkpoint.tensor("model.norm.weight").float().numpy())
        last.floats["model.norm.weight"] = 3 * norm
        last.norm_biases["model.norm"] = np.linspace(-0.1, 0.1, len(norm), dtype=np.float32)
        self.work.write_block(2, last)
        self.original = WholeModel(self.checkpoint, self.family, {}, CPU)

    def weights(self, work: WorkDir, *, refined: bool) -> dict[str, QuantizedWeight]:
        """The packed weights by full name."""
        return {
            f"{prefix}{layer}.weight": weight
            for prefix, block in finished_blocks(work, self.family, refined=refined).items()
            for layer, weight in block.weights.items()
        }

    def tensors(self, work: WorkDir, *, refined: bool) -> dict[str, torch.Tensor]:
        return changed_tensors(work, self.family, refined=refined)

    def model(self, work: WorkDir, *, refined: bool) -> WholeModel:
        """The model of the blocks' tensors, put together once more."""
        weights = model_tensors(work, self.family, self.checkpoint, refined=refined)
        return WholeModel(self.checkpoint, self.family, weights, CPU)

    def divergence(self, model: WholeModel, windows: Any = WINDOWS) -> float:
        """Mean KL divergence of the original from it, summed in float64."""
        p, q = (log_probabilities(each, windows) for each in (self.original, model))
        return float((p.exp() * (p - q)).sum(-1).mean())

    def copy(self, directory: Path) -> WorkDir:
        """A work directory with the same blocks."""
        work = WorkDir(directory / "out.gguf", {})
        for index in range(self.family.num_layers + 1):
            work.write_block(index, self.work.read_block(index))
        return work

    def runner(self) -> BlockRunner:
        return BlockRunner(self.checkpoint, self.family, CPU)

    def refine(self, directory: Path, *, rate: float = 0.01, **more: Any) -> "Refined":
        """Into a copy of the work directory, in few large steps; also returns the model that was tuned."""
        work, tuned = self.copy(directory), []

        class Spy(TunableModel):
            def __init__(self, *arguments: Any, **options: Any) -> None:
                super().__init__(*arguments, **options)
                tuned.append(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(refinement, "TunableModel", Spy)
            schedule = Schedule(passes=2, batch=4, scale_rate=rate, code_rate=1.4)
            result = refine(self.runner(), WINDOWS, work, schedule=schedule, **more)
        return work, result, tuned[0]


Refined = tuple[WorkDir, Refinement, TunableModel]


@torch.no_grad()
def log_probabilities(model: WholeModel | TunableModel, windows: Any) -> torch.Tensor:
    tokens = torch.from_numpy(windows)
    if isinstance(model, WholeModel):
        return model.log_probabilities(model.states(tokens)).double()
    return (model.states(tokens) @ model.head.T).log_softmax(-1).double()


def difference(first: WholeModel | TunableModel, second: WholeModel | TunableModel) -> float:
    return float((log_probabilities(first, WINDOWS) - log_probabilities(second, WINDOWS)).abs().max())


@pytest.fixture(scope="module", params=MODELS)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return Finished(tmp_path_factory.mktemp("finished"), request.param)


@pytest.fixture(scope="module")
def refined(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Refined:
    return finished.refine(tmp_path_factory.mktemp("refined"))


def test_the_blocks_are_the_tuned_model(finished: Finished, refined: Refined) -> None:
    """But for float16 scales. And the model that tuning began with is the one that the block loop left."""
    start = finished.model(finished.work, refined=False)
    work, result, tuned = refined
    assert result.before == pytest.approx(finished.divergence(start, WINDOWS[8:]), rel=1e-3)
    assert result.after < result.before
    assert result.scope == "model"
    model = finished.model(work, refined=True)
    assert difference(model, tuned) < 0.03 * difference(start, tuned)
    assert result.after == pytest.approx(finished.divergence(model, WINDOWS[8:]), rel=5e-3)
    assert finished.divergence(model) < 0.97 * finished.divergence(start)
    # What the block loop left is still there.
    for index in range(3):
        assert_same_block(work.read_block(index), finished.work.read_block(index))


def test_what_moves(finished: Finished, refined: Refined) -> None:
    work = refined[0]
    norms = [f"model.layers.{i}.{norm}" for i in (0, 1) for norm in ("input_layernorm", "post_attention_layernorm")]
    norms.append("model.norm")
    assert refined_norms(finished.family) == norms
    small = [f"model.layers.{i}.self_attn.{norm}" for i in (0, 1) for norm in ("q_norm", "k_norm")]
    small = small if finished.family.tied_embeddings else []
    before, after = (finished.tensors(work, refined=each) for each in (False, True))
    expected = {*before, *(f"{norm}.weight" for norm in norms + small), *(f"{norm}.bias" for norm in norms)}
    assert after.keys() == expected
    packed = finished.weights(work, refined=True)
    assert packed.keys() < expected
    for name, values in after.items():
        module, _, parameter = name.rpartition(".")
        if module in norms + small:
            old = before.get(name, torch.zeros(64) if parameter == "bias" else None)
            if old is None:
                old = finished.checkpoint.tensor(name).float()
            assert not torch.equal(values, old), name
            assert float((values - old).abs().max()) < 0.1 * max(1.0, float(old.abs().max()))
        elif name not in packed:
            assert torch.equal(values, before[name]), name
    changed = []
    for name, old_weight in finished.weights(work, refined=False).items():
        weight = packed[name]
        assert weight.type == old_weight.type
        (d, books, codes), (d_old, books_old, codes_old) = (
            tensor_types.unpack(each.type, each.data) for each in (weight, old_weight)
        )
        assert not np.array_equal(d, d_old)
        np.testing.assert_allclose(d, d_old, rtol=0.1)
        np.testing.assert_array_equal(books, books_old)
        changed.append((codes != codes_old).mean())
    assert 0.0005 < np.mean(changed) < 0.3
    for index in range(3):
        block, left = work.read_block(index, refined=True), work.read_block(index)
        number = index if index < 2 else None
        own = {norm for of, norm in map(finished.family.split_name, norms) if of == number}
        assert block.norm_biases.keys() == own
        assert block.metrics == left.metrics
        assert block.column_scales.keys() == left.column_scales.keys()
        for name, scales in block.column_scales.items():
            np.testing.assert_array_equal(scales, left.column_scales[name])
        arrays = [*block.floats.values(), *block.norm_biases.values()]
        assert {array.dtype for array in arrays} == {np.dtype(np.float32)}


def test_original_states(finished: Finished) -> None:
    """The lm_head's inputs of transformers' whole model, in batches, but for bfloat16."""
    tokens = torch.from_numpy(WINDOWS)
    found = original_states(finished.runner(), tokens, SINGLE_PROCESS, 48)
    expected = finished.original.states(tokens)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=1e-4)


def test_gradients(finished: Finished) -> None:
    """Those of a batch in three forward passes, against differences of the loss that is reported."""
    student = TunableModel(finished.runner(), [finished.work.read_block(index) for index in range(3)])
    tokens = torch.from_numpy(WINDOWS)
    expected = original_states(finished.runner(), tokens, SINGLE_PROCESS, 48)
    objective = refinement._Divergence(student, tokens, expected, SINGLE_PROCESS, 48)
    items, layers = [7, 1, 4, 0, 2], student.layers()
    objective.prepare(items)
    objective.backward()
    gain = layers["model.layers.1.post_attention_layernorm"].tuned()["gain"]
    scales = layers["model.layers.0.mlp.up_proj"].tuned()["log_scales"]
    for name, own, value in (("1.post_attention_layernorm", "gain", gain), ("0.mlp.up_proj", "log_scales", scales)):
        layer = layers[f"model.layers.{name}"]
        gradient = dict(layer.gradients())[own].flatten()
        for place in gradient.abs().topk(3).indices.tolist():
            losses = []
            for step in (3e-2, -6e-2):
                value.view(-1)[place] += step
                layer.refresh()
                losses.append(objective.loss(items) / len(items))
            value.view(-1)[place] += 3e-2
            layer.refresh()
            assert float(gradient[place]) == pytest.approx((losses[0] - losses[1]) / 6e-2, rel=3e-2), name


def test_worse_everywhere_changes_nothing(finished: Finished, tmp_path: Path) -> None:
    work, result, _ = finished.refine(tmp_path, rate=3.0)
    assert result.after == result.before
    before, after = (finished.tensors(work, refined=each) for each in (False, True))
    assert before.keys() < after.keys()
    for name, values in after.items():
        if name in before:
            assert torch.equal(values, before[name])
        elif name.endswith("bias"):
            assert not values.any()
        else:
            assert torch.equal(values, finished.checkpoint.tensor(name).float())
    for index in range(3):
        packed = [work.read_block(index, refined=each).weights for each in (False, True)]
        assert all(np.array_equal(weight.data, packed[1][layer].data) for layer, weight in packed[0].items())


def test_same_twice(finished: Finished, refined: Refined, tmp_path: Path) -> None:
    works = finished.refine(tmp_path)[0], refined[0]
    files = [{file.name: file.read_bytes() for file in work.path.iterdir()} for work in works]
    assert files[0] == files[1]
    assert len(files[0]) == 7


def test_forward_passes_of_any_size(finished: Finished, refined: Refined, tmp_path: Path) -> None:
    """One window at a time gives the same model but for rounding."""
    _, result, tuned = finished.refine(tmp_path, micro_tokens=24)
    assert result.before == pytest.approx(refined[1].before, rel=1e-4)
    assert result.after == pytest.approx(refined[1].after, rel=1e-2)
    assert difference(tuned, refined[2]) < 0.2 * difference(tuned, finished.model(finished.work, refined=False))


class TestScope:
    FAMILY = family_for({**GEOMETRIES["qwen3-8b"], "hidden_act": "silu", "rms_norm_eps": 1e-6})

    def choose(self, monkeypatch: pytest.MonkeyPatch, memory: int, device: str, **options: Any) -> str | None:
        """With so many GiB, on a GPU of that size or free in the computer."""
        size = memory * 2**30
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=size))
        monkeypatch.setattr(refinement, "available_memory", lambda: size)
        return choose_scope(self.FAMILY, Options(**options), torch.device(device))

    @pytest.mark.parametrize(
        ("device", "memory", "scope", "expected"),
        [
            ("cuda", 140, "auto", "model"),
            ("cuda", 80, "auto", "blocks"),
            ("cuda", 140, "blocks", "blocks"),
            ("cpu", 1000, "auto", "blocks"),
            ("cpu", 1000, "model", "model"),
        ],
    )
    def test_by_the_memory(
        self, monkeypatch: pytest.MonkeyPatch, device: str, memory: int, scope: str, expected: str
    ) -> None:
        assert self.choose(monkeypatch, memory, device, refine=True, refine_scope=scope) == expected
        assert self.choose(monkeypatch, memory, device, refine_scope=scope) is None

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_what_does_not_fit(self, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
        with pytest.raises(D2QError, match=r"needs \d+\.\d GiB of memory, but there are .*--refine-scope blocks"):
            self.choose(monkeypatch, 64, device, refine=True, refine_scope="model")

    def test_an_8b_model_fits_one_large_gpu(self) -> None:
        assert 80 * 2**30 < model_bytes(self.FAMILY, 8 * 65536) < 120 * 2**30
