"""Input statistics of dense layers against their formulas, with inputs from whole models."""

from pathlib import Path
from typing import Any

import pytest
import torch

from d2q_edge.options import Options
from d2q_edge.pipeline.work_dir import WorkDir
from tests.pipeline.common import PLAIN, SMALL, WINDOWS, Make, Setup, collected_statistics

TWO = {**SMALL, "num_hidden_layers": 2}


def inputs(model: Any, layers: list[str]) -> dict[str, torch.Tensor]:
    """What reaches linear layers in a whole model, [tokens, columns]."""
    seen = {}
    for layer in layers:
        model.get_submodule(layer).register_forward_pre_hook(
            lambda _, arguments, layer=layer: seen.update({layer: arguments[0].flatten(0, 1)})
        )
    model(torch.from_numpy(WINDOWS))
    return seen


@pytest.mark.slow
@torch.inference_mode()
def test_statistics_are_those_of_the_formulas(make_checkpoint: Make, tmp_path: Path) -> None:
    setup = Setup(make_checkpoint("llama", **TWO))
    work = WorkDir(tmp_path / "out.gguf", {})
    setup.run(work, PLAIN, batch_tokens=160, dtype=torch.float32)  # three batches
    found = collected_statistics(setup, work, PLAIN, 160)
    names = setup.family.linear_weights()
    assert list(found) == names
    assert len({id(statistics) for statistics in found.values()}) == 2 * 4
    quantized = setup.tensors(work)
    layers = [name.removesuffix(".weight") for name in names]
    originals = inputs(setup.whole_model({}), layers)
    for index in range(2):
        for group in setup.family.block_groups(index):
            prefix = setup.family.block_prefix(index)
            layer = f"{prefix}{group.linears[0]}"
            before = names[: layers.index(layer)]
            x = inputs(setup.whole_model({done: quantized[done] for done in before}), [layer])[layer]
            statistics, original = found[f"{layer}.weight"], originals[layer]
            torch.testing.assert_close(statistics.hessian, 2 / len(x) * x.T @ x, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(statistics.dXXT, 2 / len(x) * (original - x).T @ x, rtol=1e-3, atol=1e-4)
            assert all(found[f"{prefix}{other}.weight"] is statistics for other in group.linears)


@torch.inference_mode()
def test_alpha_counts(make_checkpoint: Make, tmp_path: Path) -> None:
    """What `collected_statistics` compares is not the same for every alpha; the default is 0.5."""
    setup = Setup(make_checkpoint("llama", **{**SMALL, "num_hidden_layers": 1}))
    work = WorkDir(tmp_path / "out.gguf", {})
    setup.run(work, PLAIN, batch_tokens=160, dtype=torch.float32)
    assert PLAIN.alpha == 0.5
    with pytest.raises(AssertionError, match=r"mlp|self_attn"):
        collected_statistics(setup, work, Options(alpha=0.25, descent_rounds=0, guidance=False), 160)
