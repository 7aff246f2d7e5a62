"""What Gemma 4's hidden states carry besides the residual stream, and the embeddings that a block has for itself."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from d2q_edge.model.blocks import BlockRunner
from d2q_edge.model.carried_state import CarriedState
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import Family, family_for
from tests.family_models import write_model

CPU = torch.device("cpu")
TOKENS = torch.tensor([[0, 255, 256, 4095], [1, 2, 257, 3000]])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny", "gemma4-e")


def family_of(model: Path) -> Family:
    return family_for(Checkpoint.open(model).config)


def test_width_by_hand(model: Path) -> None:
    """Keys and values of one head of 32 and one of 64 channels, and three digits of the token's id."""
    assert family_of(model).stream_width == 64 + 2 * 32 + 2 * 64 + 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tokens_survive_the_kept_precision(model: Path, dtype: torch.dtype) -> None:
    family = family_of(model)
    carried = CarriedState(family)
    tokens = torch.cat([TOKENS, torch.tensor([[65535, 65536, 262143, 16777215]])])
    hidden = carried.begin(torch.randn(3, 4, 64), tokens).to(dtype).float()
    assert torch.equal(carried.tokens(hidden), tokens)


def test_what_is_left_is_found_again(model: Path) -> None:
    """A block that replaces one kind of keys leaves the other as it was, and the tokens."""
    carried = CarriedState(family_of(model))
    before = carried.begin(torch.randn(2, 4, 64), TOKENS)
    keys = carried.keys(before)
    assert {kind: [tuple(part.shape) for part in parts] for kind, parts in keys.items()} == {
        "sliding_attention": [(2, 1, 4, 32)] * 2,
        "full_attention": [(2, 1, 4, 64)] * 2,
    }
    assert not any(part.any() for parts in keys.values() for part in parts)
    left = torch.randn(2, 1, 4, 64), torch.randn(2, 1, 4, 64)
    stream = torch.randn(2, 4, 64)
    after = carried.advance(stream, before, keys | {"full_attention": left})
    found = carried.keys(after)
    assert all(torch.equal(a, b) for a, b in zip(found["full_attention"], left, strict=True))
    assert not any(part.any() for part in found["sliding_attention"])
    assert torch.equal(carried.stream(after), stream) and torch.equal(carried.tokens(after), TOKENS)


def test_other_models_carry_nothing(tmp_path: Path) -> None:
    family = family_of(write_model(tmp_path / "tiny", "qwen3"))
    carried, stream = CarriedState(family), torch.randn(1, 3, 64)
    assert family.stream_width == 64
    hidden = carried.begin(stream, torch.zeros(1, 3, dtype=torch.int64))
    assert hidden is stream and carried.stream(hidden) is stream
    assert carried.advance(hidden, hidden, carried.keys(hidden)) is hidden


@torch.inference_mode()
def test_a_blocks_own_embeddings_are_transformers(model: Path) -> None:
    """transformers computes those of all blocks at once."""
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().model
    embedded = original.embed_tokens(TOKENS)
    expected = original.project_per_layer_inputs(embedded, original.get_per_layer_inputs(TOKENS, embedded))
    checkpoint = Checkpoint.open(model)
    runner = BlockRunner(checkpoint, family_for(checkpoint.config), CPU)
    for index in (0, 5):
        block = runner.load(index)
        found = block.per_layer_input(TOKENS)  # type: ignore[operator]
        torch.testing.assert_close(found, expected[:, :, index], rtol=1e-5, atol=1e-5)
        assert runner.share(block).per_layer_input is block.per_layer_input
        assert copy.deepcopy(block).get_submodule("per_layer")._block[0] is not block  # type: ignore[index]


def test_parts_of_a_matrix(model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    name = "model.embed_tokens_per_layer.weight"
    whole = checkpoint.tensor(name)
    assert torch.equal(checkpoint.part(name, slice(7, 11), slice(64, 128)), whole[7:11, 64:128])
    assert torch.equal(checkpoint.part(name, columns=slice(0, 64)), whole[:, :64])
