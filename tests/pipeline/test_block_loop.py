"""The block-by-block driver: what its streams and statistics are, resuming, determinism, errors."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from d2q_edge.calibration import hidden_states
from d2q_edge.calibration.text import load_text
from d2q_edge.distributed.process_group import SINGLE_PROCESS
from d2q_edge.errors import D2QError
from d2q_edge.formats import tensor_types
from d2q_edge.formats.tensor_types import TensorType
from d2q_edge.model.blocks import BlockRunner, add_bias
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from d2q_edge.pipeline import block_loop, solver
from d2q_edge.pipeline.block_loop import Method, corrected_norms, quantize_blocks
from d2q_edge.pipeline.column_scaling import COLUMN_SCALE
from d2q_edge.pipeline.report import Report
from d2q_edge.pipeline.type_plan import plan_types
from d2q_edge.pipeline.work_dir import Tensor, WorkDir
from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.gptaq import Feedback, layer_feedback, quantize_layer
from d2q_edge.quantize.quantized_layer import QuantizedLayer
from d2q_edge.quantize.rtn import round_layer
from d2q_edge.quantize.statistics import InputStatistics
from tests.blocks import changed_tensors
from tests.checkpoints import EXAMPLE
from tests.conftest import ExampleFiles

Make = Callable[..., Path]
WINDOWS = np.random.default_rng(2).integers(0, 4096, (12, 40))
DEFAULT = Method()
PLAIN = Method(dsq=False, dac=False, rounds=0)
SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3}


class Setup:
    """One checkpoint with a plan, and a work directory per run."""

    def __init__(self, model: Path, bits: int = 2) -> None:
        self.model = model
        self.checkpoint = Checkpoint.open(model)
        self.family = family_for(self.checkpoint.config)
        self.types = plan_types(self.family, bits).linears

    def runner(self) -> BlockRunner:
        return BlockRunner(self.checkpoint, self.family, torch.device("cpu"))

    def run(self, work: WorkDir, windows: Any = WINDOWS, method: Method = DEFAULT) -> Report:
        return quantize_blocks(self.runner(), self.types, windows, work, method)

    def tensors(self, work: WorkDir) -> dict[str, torch.Tensor]:
        """Everything that the blocks changed, as floats."""
        return changed_tensors(work, self.types)

    def whole_model(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()
        own = self.family.tensor_shapes()
        _, unexpected = model.load_state_dict({n: t for n, t in tensors.items() if n in own}, strict=False)
        assert unexpected == []
        for name in tensors.keys() - own.keys():
            module, _, parameter = name.rpartition(".")
            assert parameter == "bias"
            assert module.endswith("norm")
            add_bias(model.get_submodule(module), tensors[name])
        return model


class StoppedAt(WorkDir):
    """Ends like Ctrl-C while block `last` is being worked on."""

    last = 1

    def write_block(
        self,
        index: int,
        tensors: Mapping[str, Tensor],
        *,
        refined: bool = False,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        if index == self.last:
            raise KeyboardInterrupt
        super().write_block(index, tensors, refined=refined, facts=facts)


def all_of(stream: hidden_states.Stream) -> torch.Tensor:
    return torch.cat([stream[index] for index in range(len(stream))])


def blocks(work: WorkDir) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(work.path.glob("block-*"))}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@torch.inference_mode()
def test_streams_are_the_two_models(
    make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    setup = Setup(make_checkpoint(family, **SMALL), bits=3 if family == "qwen2" else 2)
    runner = setup.runner()
    # Small enough batches that some are held back for the mean shift.
    monkeypatch.setattr(block_loop, "BATCH_TOKENS", 80)
    monkeypatch.setattr(hidden_states, "DTYPE", torch.float32)
    driver = block_loop._Driver(runner, setup.types, WINDOWS, Method(), torch.device("cpu"), SINGLE_PROCESS)
    work = WorkDir(tmp_path / "out.gguf", {})
    for index in range(3):
        work.write_block(index, driver.quantize(index))
    quantized = setup.tensors(work)
    kinds = {name.split(".", 3)[-1] if name not in setup.types else "linear" for name in quantized}
    assert {"linear", "input_layernorm.weight", "post_attention_layernorm.weight"} <= kinds
    assert ("self_attn.v_proj.bias" in kinds) == (family == "qwen2")
    for tensors, stream in (({}, driver.original), (quantized, driver.quantized)):
        outputs: list[torch.Tensor] = []
        model = setup.whole_model(tensors)
        model.model.layers[2].register_forward_hook(lambda *args, outputs=outputs: outputs.append(args[2]))
        model(torch.from_numpy(WINDOWS))
        torch.testing.assert_close(all_of(stream), outputs[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(all_of(driver.original), all_of(driver.quantized), atol=1e-2)


@torch.inference_mode()
def test_plain_weights_are_near_the_original(make_checkpoint: Make, tmp_path: Path) -> None:
    setup = Setup(make_checkpoint("llama", **SMALL))
    work = WorkDir(tmp_path / "out.gguf", {})
    setup.run(work, method=PLAIN)
    quantized = setup.tensors(work)
    assert quantized.keys() == set(setup.family.linear_weights())
    for name, weight in quantized.items():
        original = setup.checkpoint.tensor(name).float()
        assert float((weight - original).square().mean() / original.square().mean()) < 0.5, name


@pytest.mark.parametrize("dsq", [False, True])
@torch.inference_mode()
def test_column_scales_alone_change_nothing(make_checkpoint: Make, tmp_path: Path, dsq: bool) -> None:
    """Without a type of ours there is only the reparametrization, so that both streams stay the same."""
    setup = Setup(make_checkpoint("qwen2", **SMALL))
    setup.types = dict.fromkeys(setup.types, "f16")
    work = WorkDir(tmp_path / "out.gguf", {})
    setup.run(work, method=Method(dsq=dsq, dac=False))
    changed = setup.tensors(work)
    if dsq:
        scale = work.read_block(0)[f"model.layers.0.self_attn.q_proj.{COLUMN_SCALE}"]
        assert scale.max() / scale.min() > 1.1
        expected = setup.checkpoint.tensor("model.layers.0.self_attn.q_proj.weight").float() / torch.from_numpy(scale)
        torch.testing.assert_close(changed["model.layers.0.self_attn.q_proj.weight"], expected)
    tokens = torch.from_numpy(WINDOWS)
    head = changed.pop("lm_head.weight", None)
    assert head is None
    final = changed.pop("model.norm.weight", None)
    logits = setup.whole_model(changed)(tokens).logits
    torch.testing.assert_close(logits, setup.whole_model({})(tokens).logits, rtol=1e-3, atol=1e-4)
    assert (final is not None) == dsq


def test_norms_that_get_a_bias(make_checkpoint: Make) -> None:
    family = Setup(make_checkpoint("qwen3", **SMALL)).family
    assert corrected_norms(family, PLAIN) == []
    names = [f"model.layers.{index}.post_attention_layernorm" for index in range(3)]
    assert corrected_norms(family, Method()) == [*names, "model.norm"]


@torch.inference_mode()
def test_statistics_are_those_of_the_formulas(
    make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(make_checkpoint("llama", **SMALL))
    seen: list[tuple[torch.Tensor, torch.Tensor, float]] = []

    def spy(statistics: InputStatistics, kind: TensorType, alpha: float, **options: Any) -> Feedback:
        seen.append((statistics.hessian.clone(), statistics.dXXT.clone(), alpha))
        return layer_feedback(statistics, kind, alpha, **options)

    monkeypatch.setattr(solver, "layer_feedback", spy)
    monkeypatch.setattr(block_loop, "BATCH_TOKENS", 160)  # three batches
    monkeypatch.setattr(hidden_states, "DTYPE", torch.float32)
    work = WorkDir(tmp_path / "out.gguf", {})
    setup.run(work, method=PLAIN)
    assert len(seen) == 3 * 4
    quantized = setup.tensors(work)
    linear_groups = [(index, group.linears[0]) for index in range(3) for group in setup.family.linear_groups]
    for (index, layer), (hessian, drift, alpha) in zip(linear_groups, seen, strict=True):
        if index == 2:
            continue
        name = f"model.layers.{index}.{layer}.weight"
        before = setup.family.linear_weights()[: setup.family.linear_weights().index(name)]
        inputs: list[torch.Tensor] = []
        for weights in ({}, {done: quantized[done] for done in before}):
            model = setup.whole_model(weights)
            model.model.layers[index].get_submodule(layer).register_forward_pre_hook(
                lambda _, args, inputs=inputs: inputs.append(args[0].flatten(0, 1))
            )
            model(torch.from_numpy(WINDOWS))
        original, x = inputs
        torch.testing.assert_close(hessian, 2 / len(x) * x.T @ x, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(drift, 2 / len(x) * (original - x).T @ x, rtol=1e-3, atol=1e-4)
        assert alpha == 0.5


def test_interrupted_and_resumed_is_the_same(make_checkpoint: Make, tmp_path: Path) -> None:
    # 100: the down projections are of a stock type.
    for intermediate in (256, 100):
        setup = Setup(make_checkpoint(**{**SMALL, "intermediate_size": intermediate}, name=f"m{intermediate}"))
        whole = WorkDir(tmp_path / f"whole{intermediate}", {})
        report = setup.run(whole)
        expected = set(setup.family.linear_weights()) - (
            {f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)} if intermediate == 100 else set()
        )
        assert report.layer_errors.keys() == expected
        for last in (1, 2):
            stopped = StoppedAt(tmp_path / f"stopped{intermediate}-{last}", {})
            stopped.last = last
            with pytest.raises(KeyboardInterrupt):
                setup.run(stopped)
            resumed = WorkDir(tmp_path / f"stopped{intermediate}-{last}", {})
            assert resumed.finished == last
            rest = setup.run(resumed)
            assert blocks(resumed) == blocks(whole)
            assert rest.layer_errors == report.layer_errors


def test_finished_blocks_are_not_quantized_again(
    make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(make_checkpoint(**SMALL))
    work = WorkDir(tmp_path / "out", {})
    errors = setup.run(work).layer_errors
    monkeypatch.setattr(solver, "quantize_layer", None)
    assert setup.run(work).layer_errors == errors


def test_same_twice_and_other_text_differs(make_checkpoint: Make, tmp_path: Path) -> None:
    setup = Setup(make_checkpoint(**SMALL))
    works = [WorkDir(tmp_path / name, {}) for name in "abc"]
    setup.run(works[0])
    setup.run(works[1])
    setup.run(works[2], WINDOWS[:, ::-1].copy())
    assert blocks(works[0]) == blocks(works[1]) != blocks(works[2])


def test_overflowing_activations(make_checkpoint: Make, tmp_path: Path) -> None:
    model = make_checkpoint(**SMALL, dtype=torch.float32)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e38
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e5
    save_file(tensors, model / "model.safetensors")
    work = WorkDir(tmp_path / "out", {})
    message = r"the activations of the original model are NaN or infinite behind model\.layers\.1\.mlp\.down_proj"
    with pytest.raises(D2QError, match=message):
        Setup(model).run(work)
    assert work.finished == 1


def test_quantized_stream_that_overflows(
    make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(weights: torch.Tensor, feedback: Feedback, search: CodebookSearch) -> QuantizedLayer:
        layer = quantize_layer(weights, feedback, search)
        if weights.shape[1] == 256:
            layer.weights[0, 0] = torch.inf
        return layer

    monkeypatch.setattr(solver, "quantize_layer", broken)
    with pytest.raises(
        D2QError, match=r"the activations of the quantized model are NaN or infinite behind model\.layers\.0\.mlp"
    ):
        Setup(make_checkpoint(**SMALL)).run(WorkDir(tmp_path / "out", {}))


def test_layer_errors_of_the_example(example_files: ExampleFiles) -> None:
    two, three = (example_files.reports[bits].layer_errors for bits in (2, 3))
    assert list(two) == list(three) == family_for(Checkpoint.open(EXAMPLE).config).linear_weights()
    for name in two:
        assert 0 < three[name] < two[name] < 0.2, name
    assert np.mean(list(three.values())) < 0.45 * np.mean(list(two.values()))
    assert set(example_files.reports[2].seconds) == {"forward", "statistics", "solve", "held-back text", "writing"}


@torch.inference_mode()
def test_feedback_beats_rounding_on_the_example(tmp_path: Path) -> None:
    setup = Setup(EXAMPLE)
    runner = setup.runner()
    text = load_text("builtin", "calibration").content
    tokens = torch.tensor(AutoTokenizer.from_pretrained(EXAMPLE)(text[:20000])["input_ids"][:4096]).view(-1, 512)
    block = runner.load(0)
    layers = tuple(group.linears[0] for group in setup.family.linear_groups)
    seen, _ = runner.trace(block, layers, runner.embed(tokens))
    search = CodebookSearch(tensor_types.D2Q2)
    for name in layers:
        statistics = InputStatistics(seen[name].shape[1])
        statistics.add_batch(seen[name], seen[name])
        weight = block.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        output = seen[name] @ weight.T

        def error(layer: QuantizedLayer, x: torch.Tensor = seen[name], y: torch.Tensor = output) -> float:
            return float((x @ layer.weights.T - y).square().sum() / y.square().sum())

        feedback = quantize_layer(weight, layer_feedback(statistics, search.tensor_type, 0.5), search)
        assert error(feedback) < 0.8 * error(round_layer(weight, search)), name
        lost, whole = solver._squares(weight, feedback.weights, statistics.hessian).sum(0)
        assert float(lost / whole) == pytest.approx(error(feedback), rel=1e-3)
