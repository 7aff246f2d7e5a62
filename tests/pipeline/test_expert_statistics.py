"""Quantizing experts: their statistics against a slow reference, scales, resuming, files that llama.cpp runs."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2q_edge.conversion import convert
from d2q_edge.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from d2q_edge.model.rotated_checkpoint import RotatedCheckpoint
from d2q_edge.options import Options
from d2q_edge.pipeline import expert_statistics
from d2q_edge.pipeline.block_loop import BATCH_TOKENS
from d2q_edge.pipeline.expert_statistics import statistics_bytes
from d2q_edge.pipeline.memory import plan_memory
from d2q_edge.pipeline.norm_correction import corrected_norms
from d2q_edge.pipeline.report import Report
from d2q_edge.pipeline.work_dir import WorkDir
from d2q_edge.quantize.dsq import InputEnergy, column_scales
from tests.availability import require_runtime
from tests.blocks import assert_same_block, expert_linears
from tests.checkpoints import BASE_CONFIG, FAMILY_CONFIG
from tests.export.test_expert_export import file_logits, log_probabilities
from tests.model.test_expert_families import REAL
from tests.pipeline.common import (
    CPU,
    EXACT,
    PLAIN,
    WINDOWS,
    CapturingRunner,
    Make,
    Setup,
    StoppedAt,
    block_files,
    collected_statistics,
)
from tests.quantize.test_routing import slow as slow_top_up
from tools.whole_model import WholeModel

SMALL: dict[str, Any] = {"hidden_size": 64, "moe_intermediate_size": 128, "num_experts": 5, "num_experts_per_tok": 2}
FEW: dict[str, Any] = {"num_experts": 3, "num_experts_per_tok": 2}


def whole_states(setup: Setup, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the head reads in the model with these weights, [windows, context, hidden]."""
    return WholeModel(setup.checkpoint, setup.family, weights, CPU).states(torch.from_numpy(WINDOWS))


def routing(setup: Setup, weights: dict[str, torch.Tensor], index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the router of a block reads in the model with these weights, and its probabilities."""
    model, inputs = WholeModel(setup.checkpoint, setup.family, weights, CPU), []
    router = model.module(f"model.layers.{index}.mlp.gate")
    router.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2).double()))
    model.states(torch.from_numpy(WINDOWS))
    return inputs[0], (inputs[0] @ router.get_parameter("weight").double().T).softmax(1)


@pytest.mark.slow
@torch.inference_mode()
def test_statistics_are_those_of_the_formulas(
    make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, token by token: H and D of every layer of every expert, at the tokens of the original's router."""
    setup = Setup(make_checkpoint("qwen3moe", **SMALL, dtype=torch.float32))
    monkeypatch.setattr(expert_statistics, "MINIMUM_TOKENS_PER_CHANNEL", 3)
    monkeypatch.setattr(expert_statistics, "MEMORY", 2 * 8 * 128**2)  # two experts at a time
    work = WorkDir(tmp_path / "out.gguf", {})
    setup.run(work, PLAIN, batch_tokens=160, dtype=torch.float32)  # three batches
    found = collected_statistics(setup, work, PLAIN, 160)
    assert found.keys() == set(setup.family.linear_weights())
    assert len(found) == 2 * (4 + 15)
    quantized = setup.tensors(work)
    counts = []
    for index in range(2):
        prefix = f"model.layers.{index}."
        before = {
            name: weight
            for name, weight in quantized.items()
            if setup.family.block_of(name) == index - 1 or name.startswith(f"{prefix}self_attn.")
        }
        original, probabilities = routing(setup, {}, index)
        x, _ = routing(setup, before, index)
        routed = torch.zeros_like(probabilities, dtype=torch.bool).scatter_(1, probabilities.topk(2, 1).indices, True)
        tokens = slow_top_up(probabilities, routed, 3 * 64)
        for number in range(5):
            gate, up, down = (f"{name}.weight" for name in expert_linears(number))
            taken = tokens[:, number]
            counts.append((int(routed[:, number].sum()), int(taken.sum())))
            pairs = [(original[taken], x[taken])] * 2
            pairs.append(
                tuple(
                    torch.nn.functional.silu(inputs[taken] @ weights[prefix + gate].double().T)
                    * (inputs[taken] @ weights[prefix + up].double().T)
                    for inputs, weights in (
                        (original, {name: setup.checkpoint.tensor(name) for name in (prefix + gate, prefix + up)}),
                        (x, quantized),
                    )
                )  # type: ignore[arg-type]
            )
            for name, (teacher, student) in zip((gate, up, down), pairs, strict=True):
                statistics = found[prefix + name]
                hessian, dXXT = statistics.hessian, statistics.dXXT
                expected = 2 / len(student) * student.T @ student
                assert int(statistics.tokens) == len(student)
                torch.testing.assert_close(hessian.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.max()))
                expected = 2 / len(student) * (teacher - student).T @ student
                torch.testing.assert_close(dXXT.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert {taken > own for own, taken in counts} == {True, False}, "some experts have tokens enough, some haven't"


@pytest.mark.parametrize("family", ["qwen3moe", "olmoe"])
@torch.inference_mode()
def test_streams_are_the_two_models(make_checkpoint: Make, tmp_path: Path, family: str) -> None:
    """With everything that is done to a block, also the bias of the norm that router and experts read."""
    setup = Setup(make_checkpoint(family, dtype=torch.float32, **FEW))
    work, runner = WorkDir(tmp_path / "out.gguf", {}), CapturingRunner(setup)
    setup.run(work, runner=runner, **EXACT)
    changed = {name: tensor for name, tensor in setup.tensors(work).items() if name.startswith("model.layers.")}
    assert "model.layers.1.mlp.gate.weight" in changed
    assert any(name.endswith("post_attention_layernorm.bias") for name in changed)
    norm = setup.runner().final_norm()
    for tensors, stream in zip(({}, changed), runner.streams(), strict=True):
        difference = norm(stream) - whole_states(setup, tensors)
        # Here and there a token is so undecided that another expert gets it.
        assert (difference.abs().amax(-1) < 1e-3).float().mean() > 0.99
    (work.path / "block-0002.safetensors").unlink()
    again = CapturingRunner(setup)
    setup.run(work, runner=again, **EXACT)
    for expected, found in zip(runner.streams(), again.streams(), strict=True):
        assert torch.equal(found, expected), "replayed to the last bit"


def test_chunks_change_nothing(make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(make_checkpoint("olmoe", intermediate_size=64, **FEW))
    works = [WorkDir(tmp_path / name, {}) for name in "ab"]
    setup.run(works[0])
    monkeypatch.setattr(expert_statistics, "MEMORY", 1)
    setup.run(works[1])
    assert works[0].finished == 3
    for index in range(works[0].finished):
        assert_same_block(*(work.read_block(index) for work in works))


@pytest.mark.parametrize("family", ["qwen3moe", "olmoe"])
@torch.inference_mode()
def test_column_scales_alone_change_nothing(make_checkpoint: Make, tmp_path: Path, family: str) -> None:
    """Without a type of ours there is only the reparametrization, of norm, router and all experts."""
    setup = Setup(make_checkpoint(family, dtype=torch.float32), type_name="f16")
    work = WorkDir(tmp_path / "out.gguf", {})
    setup.run(work, Options(dac=False, guidance=False))
    changed = setup.tensors(work)
    del changed["model.norm.weight"]  # its scales are in the head, which the file's writer divides
    original = setup.checkpoint.tensor
    prefix = "model.layers.1."
    column_scales = {name: torch.from_numpy(array) for name, array in work.read_block(1).column_scales.items()}
    scales = column_scales["mlp.experts.0.gate_proj"]
    assert scales.max() / scales.min() > 1.1
    for name in ("mlp.gate.weight", "mlp.experts.3.gate_proj.weight"):
        torch.testing.assert_close(changed[prefix + name], original(prefix + name) / scales)
    own = column_scales["mlp.experts.3.down_proj"]
    assert not torch.equal(own, column_scales["mlp.experts.4.down_proj"])
    up = "mlp.experts.3.up_proj.weight"
    torch.testing.assert_close(changed[prefix + up], original(prefix + up) / scales * own[:, None])
    expected, found = whole_states(setup, {}), whole_states(setup, changed)
    # Here and there a token is so undecided that another expert gets it.
    assert ((found - expected).abs().amax(-1) < 1e-4).float().mean() > 0.99


@torch.inference_mode()
def test_scales_follow_the_formula(make_checkpoint: Make, tmp_path: Path) -> None:
    """The shared scales weigh every expert's weights by its tokens; those of down are made of its own tokens."""
    setup = Setup(make_checkpoint("qwen3moe", **SMALL, dtype=torch.float32), type_name="f16")
    work = WorkDir(tmp_path / "out.gguf", {})
    setup.run(work, Options(dac=False, guidance=False), batch_tokens=40, dtype=torch.float32)
    found = {name: torch.from_numpy(array) for name, array in work.read_block(0).column_scales.items()}
    inputs, probabilities = routing(setup, {}, 0)
    routed = torch.zeros_like(probabilities, dtype=torch.bool).scatter_(1, probabilities.topk(2, 1).indices, True)
    energy, weights = InputEnergy(64), torch.zeros(64)
    energy.add_batch(inputs.float())
    for number in range(5):
        gate, up, _ = (setup.checkpoint.tensor(f"model.layers.0.{name}.weight") for name in expert_linears(number))
        weights += (gate.square().sum(0) + up.square().sum(0)) * routed[:, number].float().mean()
    expected = column_scales(weights, energy.conditional())
    torch.testing.assert_close(found["mlp.experts.0.gate_proj"], expected, rtol=1e-3, atol=0)
    gate, up, down = (setup.checkpoint.tensor(f"model.layers.0.{name}.weight") for name in expert_linears(2))
    own = inputs[routed[:, 2]].float()
    energy = InputEnergy(128)
    energy.add_batch(torch.nn.functional.silu(own @ gate.T) * (own @ up.T))
    expected = column_scales(down.square().sum(0), energy.conditional())
    torch.testing.assert_close(found["mlp.experts.2.down_proj"], expected, rtol=1e-3, atol=0)


class Together(ProcessGroup):
    """Two processes, played by threads."""

    meeting = threading.Barrier(2)
    slots: ClassVar[dict[int, list[torch.Tensor]]] = {}

    def _meet(self, tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
        self.slots[self.rank] = [tensor.clone() for tensor in tensors]
        self.meeting.wait()
        found = [list(self.slots[rank]) for rank in range(2)]
        self.meeting.wait()
        return found

    def all_reduce(self, tensors: Sequence[torch.Tensor]) -> None:
        for tensor, *others in zip(tensors, *self._meet(list(tensors)), strict=True):
            tensor.copy_(others[0] + others[1])

    def broadcast(self, tensor: torch.Tensor, owner: int) -> None:
        tensor.copy_(self._meet([tensor])[owner][0])

    def all_gather(self, part: torch.Tensor, rows: int) -> torch.Tensor:
        return torch.cat([parts[0] for parts in self._meet([part])])

    def barrier(self) -> None:
        self.meeting.wait()


def test_two_processes_do_the_same(make_checkpoint: Make, tmp_path: Path) -> None:
    setup = Setup(make_checkpoint("qwen3moe", **FEW))

    def run(directory: str, processes: ProcessGroup) -> Report:
        return setup.run(WorkDir(tmp_path / directory, {}), PLAIN, processes=processes, batch_tokens=160)

    alone = run("alone", SINGLE_PROCESS)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run, "shared", Together(rank, 2, CPU)) for rank in range(2)]
        reports = [run.result(120) for run in runs]
    assert reports[0].layer_errors == reports[1].layer_errors
    for name, error in alone.layer_errors.items():
        assert reports[0].layer_errors[name] == pytest.approx(error, rel=0.02), name


def test_interrupted_and_resumed_is_the_same(make_checkpoint: Make, tmp_path: Path) -> None:
    setup = Setup(make_checkpoint("qwen3moe", **FEW))
    whole = WorkDir(tmp_path / "whole", {})
    report = setup.run(whole)
    assert report.layer_errors.keys() == set(setup.family.linear_weights())
    stopped = StoppedAt(tmp_path / "stopped", {})
    with pytest.raises(KeyboardInterrupt):
        setup.run(stopped)
    resumed = WorkDir(tmp_path / "stopped", {})
    assert resumed.finished == 1
    setup.run(resumed)
    assert block_files(resumed) == block_files(whole)


def unwanted_expert(model: Path) -> None:
    """Let no token ever go to expert 3 of block 0: the first channel is large and positive, and expert 3 shuns it."""
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, 0] = 1.0
    tensors["model.layers.0.mlp.gate.weight"][3] = 0.0
    tensors["model.layers.0.mlp.gate.weight"][3, 0] = -50.0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dsq", [False, True])
@torch.inference_mode()
def test_an_expert_that_sees_no_token(make_checkpoint: Make, tmp_path: Path, dsq: bool) -> None:
    model = make_checkpoint("qwen3moe", **SMALL, dtype=torch.float32)
    unwanted_expert(model)
    setup = Setup(model)
    _, probabilities = routing(setup, {}, 0)
    assert (probabilities.argsort(1, descending=True)[:, :2] != 3).all()
    work = WorkDir(tmp_path / "out.gguf", {})
    report = setup.run(work, Options(dsq=dsq, dac=False, guidance=False))
    errors = {name: report.layer_errors[f"model.layers.0.{name}.weight"] for name in expert_linears(3)}
    assert all(0 < error < 0.15 for error in errors.values()), errors
    tensors = setup.tensors(work)
    for name in expert_linears(3):
        weight = tensors[f"model.layers.0.{name}.weight"]
        assert bool(weight.isfinite().all())
        assert bool((weight != 0).any())
    if dsq:
        scale = work.read_block(0).column_scales["mlp.experts.3.down_proj"]
        assert (scale == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3moe", {"hidden_size": 256, "moe_intermediate_size": 256, **FEW}),
        ("olmoe", {"intermediate_size": 128, **FEW}),
    ],
)
@torch.inference_mode()
def test_calibrated_files(make_checkpoint: Make, tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    """llama.cpp computes with the file what torch computes with its dequantized weights."""
    require_runtime()
    model, out = make_checkpoint(family, dtype=torch.float32, **options), tmp_path / "out.gguf"
    # Two batches, so that DAC has one for validation.
    settings = Options(calibration_tokens=2 * BATCH_TOKENS, context=64, embedding_type="f32", head_type="f32")
    planned = convert(model, out, settings, dry_run=True)
    done = convert(model, out, settings)
    assert planned.size == done.size == out.stat().st_size
    file, checkpoint = GGUFFile(out), Checkpoint.open(model)
    bound = family_for(checkpoint.config)
    dequantized = {name: file.dequantize(name).copy() for name in file.tensors}
    weights = {}
    for name in bound.tensor_shapes():
        values = dequantized[bound.gguf_name(name)]
        weights[name] = torch.from_numpy(values[int(name.split(".")[5])] if ".experts." in name else values)
    plain = dict(weights)
    for norm in corrected_norms(bound, settings):
        weights[f"{norm}.bias"] = torch.from_numpy(dequantized[bound.gguf_name(f"{norm}.bias")])
    assert file.tensors["blk.0.ffn_gate_inp.weight"].type_name == "f32"
    assert not torch.equal(
        weights["model.layers.0.mlp.gate.weight"], checkpoint.tensor("model.layers.0.mlp.gate.weight")
    )
    found = file_logits(out).log_softmax(-1)
    near, unbiased, far = (
        (expected.exp() * (expected - found)).sum(-1).median()
        for expected in (log_probabilities(checkpoint, tensors) for tensors in (weights, plain, {}))
    )
    # llama.cpp rounds activations to 8 bits; a token may take another expert for that, hence the median.
    assert near < 5e-4
    assert unbiased > 2 * near, "llama.cpp adds the biases of norms"
    assert far > 20 * near


def test_memory_of_a_real_model(tmp_path: Path) -> None:
    """Counted by hand, for 65536 tokens: what must be there at least, and not much more."""
    family = family_for(REAL["Qwen3-30B-A3B"])
    plan = plan_memory(family, 65536, 4096, CPU, tmp_path / "out.gguf", 0, limit=2**36)
    block = 4 * (128 * 3 * 2048 * 768 + 128 * 2048 + 2 * 2048 * 4096 + 2 * 2048 * 512 + 2 * 2048 + 2 * 128)
    group, energies, streams = 2**30, 4 * 128 * 768**2, 2 * 2 * 65536 * 2048
    least = 2 * block + group + streams + energies
    assert least < plan.host < 1.5 * least + 2 * 2**30
    assert statistics_bytes(family) == 32 * 2 * 4 * 2048**2 == group
    assert statistics_bytes(family_for(BASE_CONFIG | FAMILY_CONFIG["qwen3"])) == 0


@torch.inference_mode()
def test_rotated_models_are_the_same(make_checkpoint: Make) -> None:
    """The router is rotated along with what reads the same norm, and every expert's down with what writes."""
    checkpoint = Checkpoint.open(make_checkpoint("qwen3moe", dtype=torch.float32))
    rotated = RotatedCheckpoint(checkpoint, seed=0)
    expected = log_probabilities(checkpoint, {})
    assert (log_probabilities(rotated, {}) - expected).abs().amax(-1).median() < 1e-4
