"""Test blocks that run one at a time against transformers' whole models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from d2q_edge.errors import D2QError
from d2q_edge.model.blocks import BlockRunner, add_bias
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from tests.model.test_families import LLAMA3_ROPE

Make = Callable[..., Path]
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"dtype": torch.float16, "num_key_value_heads": 4}),
    ("qwen2", {"tie_word_embeddings": True, "dtype": torch.float32}),
    ("qwen3", {"rope_theta": 1e6, "shards": 2}),
]
LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
TOKENS = torch.randint(0, 4096, (3, 40), generator=torch.Generator().manual_seed(1))


def runner_for(model: Path) -> BlockRunner:
    checkpoint = Checkpoint.open(model)
    return BlockRunner(checkpoint, family_for(checkpoint.config), torch.device("cpu"))


def whole_model(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("family", "options"), MODELS)
@torch.inference_mode()
def test_all_blocks_are_the_model(make_checkpoint: Make, family: str, options: dict[str, Any]) -> None:
    path = make_checkpoint(family, **options)
    runner, model = runner_for(path), whole_model(path)
    hidden = runner.embed(TOKENS)
    assert hidden.dtype == torch.float32
    for index in range(2):
        hidden = runner.forward(runner.load(index), hidden)
    norm = runner.checkpoint.tensor("model.norm.weight").float()
    normed = hidden * (hidden.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm
    head = "model.embed_tokens.weight" if options.get("tie_word_embeddings") else "lm_head.weight"
    logits = normed @ runner.checkpoint.tensor(head).float().T
    torch.testing.assert_close(logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "options"), MODELS)
@torch.inference_mode()
def test_captured_inputs_are_those_of_the_model(make_checkpoint: Make, family: str, options: dict[str, Any]) -> None:
    path = make_checkpoint(family, **options)
    runner, model = runner_for(path), whole_model(path)
    expected: dict[str, torch.Tensor] = {}
    for name in LAYERS:
        layer = model.model.layers[0].get_submodule(name)
        layer.register_forward_pre_hook(lambda _, args, name=name: expected.__setitem__(name, args[0].flatten(0, 1)))
    outputs: list[torch.Tensor] = []
    model.model.layers[0].register_forward_hook(lambda *args: outputs.append(args[2]))
    model(TOKENS)
    block = runner.load(0)
    seen, output = runner.trace(block, LAYERS, runner.embed(TOKENS))
    torch.testing.assert_close(output, outputs[0], rtol=1e-5, atol=1e-5)
    assert seen.keys() == set(LAYERS)
    for name in LAYERS:
        torch.testing.assert_close(seen[name], expected[name], rtol=1e-5, atol=1e-5)
        assert torch.equal(runner.input_of(block, name, runner.embed(TOKENS)), seen[name])


@torch.inference_mode()
def test_sublayers_follow_the_residual_stream(make_checkpoint: Make) -> None:
    """Running a block sublayer by sublayer produces the same inputs as running it whole."""
    runner = runner_for(make_checkpoint())
    block, residual = runner.load(0), runner.embed(TOKENS)
    seen, output = runner.trace(block, LAYERS, residual)
    for sublayer in runner.family.block_sublayers(0):
        for group in runner.family.sublayer_groups(0, sublayer):
            inputs = runner.group_input(block, sublayer, group, residual)
            torch.testing.assert_close(inputs, seen[group.linears[0]], rtol=1e-5, atol=1e-5)
        traced, moved = runner.sublayer_trace(block, sublayer, group.linears, residual)
        torch.testing.assert_close(traced[group.linears[0]], inputs)
        residual = runner.sublayer_forward(block, sublayer, residual)
        assert torch.equal(moved, residual)
    torch.testing.assert_close(residual, output, rtol=1e-5, atol=1e-5)
    assert [name for name, module in block.named_modules() if module._forward_pre_hooks] == []


@torch.inference_mode()
def test_norm_biases_are_those_of_one_copy(make_checkpoint: Make) -> None:
    runner = runner_for(make_checkpoint())
    block, hidden = runner.load(0), runner.embed(TOKENS)
    before = runner.input_of(block, "mlp.gate_proj", hidden)
    bias = torch.linspace(-1, 1, hidden.shape[-1])
    copied = runner.share(block)
    add_bias(copied.get_submodule("post_attention_layernorm"), bias)
    torch.testing.assert_close(runner.input_of(copied, "mlp.gate_proj", hidden), before + bias)
    assert torch.equal(runner.input_of(block, "mlp.gate_proj", hidden), before)
    assert torch.equal(runner.input_of(runner.load(0), "mlp.gate_proj", hidden), before)


@torch.inference_mode()
def test_attention_is_causal(make_checkpoint: Make) -> None:
    runner = runner_for(make_checkpoint())
    block = runner.load(1)
    hidden = runner.embed(TOKENS)
    changed = hidden.clone()
    changed[:, 20:] += 1
    before, after = runner.forward(block, hidden), runner.forward(block, changed)
    torch.testing.assert_close(before[:, :20], after[:, :20], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(before[:, 20:], after[:, 20:], atol=0.1)


@torch.inference_mode()
def test_a_sublayer_can_be_finished(make_checkpoint: Make) -> None:
    """From the input of its last layer, to the last bit; other layers don't put out the result."""
    runner = runner_for(make_checkpoint())
    block, residual = runner.load(0), runner.embed(TOKENS)
    for sublayer, layer in zip(runner.family.block_sublayers(0), ("self_attn.o_proj", "mlp.down_proj"), strict=True):
        seen, moved = runner.sublayer_trace(block, sublayer, (layer,), residual)
        assert runner.puts_out(block, sublayer, layer)
        assert torch.equal(runner.finish_sublayer(block, sublayer, layer, seen[layer], residual), moved)
    attention, mlp = runner.family.block_sublayers(0)
    assert not runner.puts_out(block, attention, "self_attn.v_proj")
    assert not runner.puts_out(block, mlp, "mlp.up_proj")
    assert [name for name, module in block.named_modules() if module._forward_hooks] == []


@torch.inference_mode()
def test_hooks_do_not_stay(make_checkpoint: Make) -> None:
    runner = runner_for(make_checkpoint())
    block, hidden = runner.load(0), runner.embed(TOKENS)
    runner.trace(block, LAYERS, hidden)
    runner.input_of(block, LAYERS[2], hidden)

    def broken(*_: object) -> None:
        raise ArithmeticError

    handle = block.get_submodule(LAYERS[1]).register_forward_pre_hook(broken)
    with pytest.raises(ArithmeticError):
        runner.trace(block, LAYERS, hidden)
    handle.remove()
    assert [name for name, module in block.named_modules() if module._forward_pre_hooks] == []


@torch.inference_mode()
def test_input_of_computes_nothing_after_it(make_checkpoint: Make) -> None:
    runner = runner_for(make_checkpoint())
    block = runner.load(0)
    reached: list[str] = []
    for name in LAYERS:
        block.get_submodule(name).register_forward_hook(lambda *_, name=name: reached.append(name))
    runner.input_of(block, "mlp.gate_proj", runner.embed(TOKENS))
    assert reached == ["self_attn.q_proj", "self_attn.o_proj"]
    reached.clear()
    inputs = runner.inputs_of(block, ("self_attn.q_proj", "self_attn.o_proj"), runner.embed(TOKENS))
    assert list(inputs) == ["self_attn.q_proj", "self_attn.o_proj"]
    assert reached == ["self_attn.q_proj"]


def test_a_copy_shares_weights_until_they_are_replaced(make_checkpoint: Make) -> None:
    runner = runner_for(make_checkpoint())
    hidden = runner.embed(TOKENS)
    with torch.inference_mode():
        block = runner.load(0)
        before = runner.forward(block, hidden)
        copied = runner.share(block)
        own, theirs = dict(block.named_parameters()), dict(copied.named_parameters())
        assert all(own[name] is theirs[name] for name in own)
        copied.get_submodule("mlp.down_proj").weight = nn.Parameter(torch.zeros(64, 96), requires_grad=False)
        assert not torch.allclose(runner.forward(copied, hidden), before, atol=1e-3)
        assert torch.equal(runner.forward(block, hidden), before)
        assert torch.equal(runner.forward(runner.load(0), hidden), before)


def test_config_that_transformers_refuses(make_checkpoint: Make) -> None:
    path = make_checkpoint()
    checkpoint = Checkpoint.open(path)
    family = family_for(checkpoint.config)
    (path / "config.json").write_text('{"model_type": "unknown"}')
    with pytest.raises(D2QError, match=r"transformers can't build the model of .*tiny"):
        BlockRunner(checkpoint, family, torch.device("cpu"))


def test_embeddings_are_on_the_runners_device(make_checkpoint: Make) -> None:
    runner = runner_for(make_checkpoint("qwen3"))
    expected = runner.checkpoint.tensor("model.embed_tokens.weight")[TOKENS].float()
    assert torch.equal(runner.embed(TOKENS), expected)
    runner.device = torch.device("meta")
    embedded = runner.embed(TOKENS)
    assert (embedded.device, embedded.dtype) == (runner.device, torch.float32)


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        ("llama", {}, True),
        ("qwen3moe", {}, False),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, False),
    ],
    ids=["plain", "experts", "dynamic_rope"],
)
def test_what_a_cuda_graph_can_hold(
    make_checkpoint: Make, family: str, options: dict[str, Any], expected: bool
) -> None:
    """What depends on values that are computed can't be recorded."""
    runner = BlockRunner.__new__(BlockRunner)
    runner.device = torch.device("cuda")
    path = make_checkpoint(family)
    real = runner_for(path)
    runner.family, runner._rotary = real.family, real._rotary
    if options:
        assert runner._rotary is not None
        runner._rotary.rope_type = options["rope_scaling"]["rope_type"]
    assert runner.capturable == expected
    assert not real.capturable, "it is on a CPU"
