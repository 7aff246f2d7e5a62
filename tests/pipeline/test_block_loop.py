"""The loop over blocks: what its hidden states are, resuming, determinism, errors."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from d2q_edge.errors import D2QError
from d2q_edge.formats.quantized_block import QuantizedBlock
from d2q_edge.model.blocks import BlockRunner
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from d2q_edge.options import Options
from d2q_edge.pipeline import block_loop
from d2q_edge.pipeline.kept_inputs import KeptInputs
from d2q_edge.pipeline.work_dir import WorkDir
from tests.checkpoints import EXAMPLE
from tests.conftest import ExampleFiles
from tests.family_models import write_model
from tests.pipeline.common import (
    CPU,
    EXACT,
    PLAIN,
    SMALL,
    WINDOWS,
    CapturingRunner,
    Make,
    Setup,
    StoppedAt,
    block_files,
)


class TestStreams:
    """The hidden states in the loop are those of the original model and of the one that the blocks make."""

    @pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
    @torch.inference_mode()
    def test_are_the_two_models(self, make_checkpoint: Make, tmp_path: Path, family: str) -> None:
        setup = Setup(make_checkpoint(family, **SMALL), bits=3 if family == "qwen2" else 2)
        work, runner = WorkDir(tmp_path / "out.gguf", {}), CapturingRunner(setup)
        setup.run(work, runner=runner, **EXACT)
        changed = {name: tensor for name, tensor in setup.tensors(work).items() if name.startswith("model.layers.")}
        kinds = {name.split(".", 3)[-1] if name not in setup.types else "linear" for name in changed}
        assert {"linear", "input_layernorm.weight", "post_attention_layernorm.weight"} <= kinds
        assert "post_attention_layernorm.bias" in kinds
        assert ("self_attn.v_proj.bias" in kinds) == (family == "qwen2")
        original, quantized = runner.streams()
        for tensors, stream in (({}, original), (changed, quantized)):
            outputs: list[torch.Tensor] = []
            model = setup.whole_model(tensors)
            model.model.layers[2].register_forward_hook(lambda *args, outputs=outputs: outputs.append(args[2]))
            model(torch.from_numpy(WINDOWS))
            torch.testing.assert_close(stream, outputs[0], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(original, quantized, atol=1e-2)

    @pytest.mark.parametrize("family", ["qwen2", "qwen3"])
    def test_are_the_same_when_blocks_are_replayed(self, make_checkpoint: Make, tmp_path: Path, family: str) -> None:
        """To the last bit, or a resumed conversion would give another file."""
        setup = Setup(make_checkpoint(family, **SMALL))
        work, runner = WorkDir(tmp_path / "out.gguf", {}), CapturingRunner(setup)
        setup.run(work, runner=runner, **EXACT)
        files = block_files(work)
        (work.path / "block-0003.safetensors").unlink()
        again = CapturingRunner(setup)
        report = setup.run(work, runner=again, **EXACT)
        assert "solve" not in report.seconds
        for expected, found in zip(runner.streams(), again.streams(), strict=True):
            assert torch.equal(found, expected)
        assert block_files(work) == files


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "lfm2", "qwen3.5", "qwen3moe"])
def test_kept_inputs_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Whether all of them are kept, some, or none, the blocks are the same to the last bit."""
    setup = Setup(write_model(tmp_path / "model", family))
    files = []
    for memory in (0, 2 * 80 * 64 * 4, None):
        monkeypatch.setattr(block_loop, "KeptInputs", lambda _, memory=memory: KeptInputs(memory))
        work = WorkDir(tmp_path / f"{memory}.gguf", {})
        setup.run(work, **EXACT)
        files.append(block_files(work))
    assert files[0] == files[1] == files[2]


def test_nothing_is_computed_twice(make_checkpoint: Make, tmp_path: Path) -> None:
    """A batch passes the quantized model's layers once, the original's attention twice (DAC), its MLP once."""
    setup = Setup(make_checkpoint("qwen3", **SMALL))
    calls: Counter[tuple[str, str]] = Counter()

    class Counting(BlockRunner):
        def load(self, index: int, following: int | None = None) -> nn.Module:
            return self._count(super().load(index, following), "original")

        def share(self, block: nn.Module) -> nn.Module:
            copied = super().share(block)
            for module in copied.modules():
                module._forward_pre_hooks.clear()
            return self._count(copied, "quantized")

        def _count(self, block: nn.Module, model: str) -> nn.Module:
            for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
                layer = block.get_submodule(name)
                layer.register_forward_pre_hook(lambda _, given, key=(model, name): self._add(key, given[0]))
            return block

        def _add(self, key: tuple[str, str], given: torch.Tensor) -> None:
            # Not the token that is tried out.
            calls[key] += given.shape[0] * given.shape[1] == 80

    runner = Counting(setup.checkpoint, setup.family, CPU)
    setup.run(WorkDir(tmp_path / "out.gguf", {}), Options(dsq=False, guidance=False), runner=runner, **EXACT)
    batches = 3 * len(WINDOWS) // 2
    assert calls == {
        ("original", "self_attn.q_proj"): 2 * batches,
        ("original", "self_attn.o_proj"): 2 * batches,
        ("original", "mlp.up_proj"): batches,
        ("original", "mlp.down_proj"): batches,
        ("quantized", "self_attn.q_proj"): batches,
        ("quantized", "self_attn.o_proj"): 2 * batches,
        ("quantized", "mlp.up_proj"): batches,
        ("quantized", "mlp.down_proj"): 2 * batches,
    }


@torch.inference_mode()
def test_plain_weights_are_near_the_original(make_checkpoint: Make, tmp_path: Path) -> None:
    setup = Setup(make_checkpoint("llama", **SMALL))
    work = WorkDir(tmp_path / "out.gguf", {})
    setup.run(work, PLAIN)
    quantized = setup.tensors(work)
    assert quantized.keys() == set(setup.family.linear_weights())
    for name, weight in quantized.items():
        original = setup.checkpoint.tensor(name).float()
        assert float((weight - original).square().mean() / original.square().mean()) < 0.5, name


@pytest.mark.parametrize("dsq", [False, True])
@torch.inference_mode()
def test_column_scales_alone_change_nothing(make_checkpoint: Make, tmp_path: Path, dsq: bool) -> None:
    """Without a type of ours there is only the reparametrization, so that both models stay the same."""
    setup = Setup(make_checkpoint("qwen2", **SMALL), type_name="f16")
    work = WorkDir(tmp_path / "out.gguf", {})
    setup.run(work, Options(dsq=dsq, dac=False, guidance=False))
    changed = setup.tensors(work)
    scales = work.read_block(0).column_scales
    assert bool(scales) == dsq
    if dsq:
        scale = scales["self_attn.q_proj"]
        assert scale.max() / scale.min() > 1.1
        expected = setup.checkpoint.tensor("model.layers.0.self_attn.q_proj.weight").float() / torch.from_numpy(scale)
        torch.testing.assert_close(changed["model.layers.0.self_attn.q_proj.weight"], expected)
    tokens = torch.from_numpy(WINDOWS)
    assert "lm_head.weight" not in changed
    final = changed.pop("model.norm.weight", None)
    logits = setup.whole_model(changed)(tokens).logits
    torch.testing.assert_close(logits, setup.whole_model({})(tokens).logits, rtol=1e-3, atol=1e-4)
    assert (final is not None) == dsq


class TestResuming:
    # 100: the down projections are of a stock type.
    @pytest.mark.parametrize("intermediate", [pytest.param(256, marks=pytest.mark.slow), 100])
    @pytest.mark.parametrize("last", [1, 2])
    def test_gives_the_same(self, make_checkpoint: Make, tmp_path: Path, intermediate: int, last: int) -> None:
        setup = Setup(make_checkpoint(**{**SMALL, "intermediate_size": intermediate}))
        whole = WorkDir(tmp_path / "whole", {})
        report = setup.run(whole)
        stock = {f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)} if intermediate == 100 else set()
        assert report.layer_errors.keys() == set(setup.family.linear_weights()) - stock
        stopped = StoppedAt(tmp_path / "stopped", {})
        stopped.last = last
        with pytest.raises(KeyboardInterrupt):
            setup.run(stopped)
        resumed = WorkDir(tmp_path / "stopped", {})
        assert resumed.finished == last
        rest = setup.run(resumed)
        assert block_files(resumed) == block_files(whole)
        assert rest.layer_errors == report.layer_errors

    def test_quantizes_nothing_twice(self, make_checkpoint: Make, tmp_path: Path) -> None:
        class Finished(WorkDir):
            def write_block(self, index: int, block: QuantizedBlock, *, refined: bool = False) -> None:
                raise AssertionError(f"block {index} is written again")

        setup = Setup(make_checkpoint(**SMALL))
        first = setup.run(WorkDir(tmp_path / "out", {}))
        second = setup.run(Finished(tmp_path / "out", {}))
        assert second.layer_errors == first.layer_errors
        assert "solve" in first.seconds
        assert "solve" not in second.seconds


@pytest.mark.slow
def test_same_twice_and_other_text_differs(make_checkpoint: Make, tmp_path: Path) -> None:
    setup = Setup(make_checkpoint(**SMALL))
    works = [WorkDir(tmp_path / name, {}) for name in "abc"]
    setup.run(works[0])
    setup.run(works[1])
    setup.run(works[2], windows=WINDOWS[:, ::-1].copy())
    assert block_files(works[0]) == block_files(works[1]) != block_files(works[2])


def test_overflowing_activations(make_checkpoint: Make, tmp_path: Path) -> None:
    model = make_checkpoint(**SMALL, dtype=torch.float32)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e38
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e5
    save_file(tensors, model / "model.safetensors")
    work = WorkDir(tmp_path / "out", {})
    message = r"the activations of the original model are NaN or infinite after model\.layers\.1\.mlp\.down_proj"
    with pytest.raises(D2QError, match=message):
        Setup(model).run(work)
    assert work.finished == 1


@pytest.mark.slow
def test_layer_errors_of_the_example(example_files: ExampleFiles) -> None:
    two, three = (example_files.reports[bits].layer_errors for bits in (2, 3))
    assert list(two) == list(three) == family_for(Checkpoint.open(EXAMPLE).config).linear_weights()
    for name in two:
        assert 0 < three[name] < two[name] < 0.2, name
    assert np.mean(list(three.values())) < 0.45 * np.mean(list(two.values()))
    assert set(example_files.reports[2].seconds) == {
        "gradients",
        "forward",
        "statistics",
        "solve",
        "validation",
        "writing",
    }
