"""Perplexity and KL divergence in torch against float64 sums over transformers' own model, token by token."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from d2q_edge.calibration.chat_template import ChatTemplate
from d2q_edge.calibration.text import Text
from d2q_edge.errors import D2QError
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from tests.checkpoints import EXAMPLE
from tools.torch_evaluation import Reference, evaluation_chunks
from tools.whole_model import WholeModel

Make = Callable[..., Path]
WINDOWS = np.random.default_rng(3).integers(0, 4096, (5, 24))
CPU = torch.device("cpu")


def changes(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Some replaced weights, and biases for two norms."""
    generator = torch.Generator().manual_seed(0)
    layer = "model.layers.1.mlp.down_proj.weight"
    weight = checkpoint.tensor(layer).float()
    width = len(weight)
    return {
        layer: weight + 0.1 * weight.std() * torch.randn(weight.shape, generator=generator),
        "model.layers.0.post_attention_layernorm.bias": 0.1 * torch.randn(width, generator=generator),
        "model.norm.bias": 0.3 * torch.randn(width, generator=generator),
        "model.layers.0.input_layernorm.weight": torch.ones(width),
    }


def slow_log_probabilities(model: Path, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Float64 [windows, context, vocabulary] of the whole model."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    for name, value in weights.items():
        module, _, parameter = name.rpartition(".")
        if parameter == "bias":
            whole.get_submodule(module).register_forward_hook(lambda _m, _a, result, value=value: result + value)
        else:
            setattr(whole.get_submodule(module), parameter, torch.nn.Parameter(value.double()))
    with torch.no_grad():
        logits: torch.Tensor = whole(torch.from_numpy(WINDOWS)).logits
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_against_the_slow_version(make_checkpoint: Make, name: str) -> None:
    model = EXAMPLE if name == "tied" else make_checkpoint("llama")
    checkpoint = Checkpoint.open(model)
    family = family_for(checkpoint.config)
    assert family.tied_embeddings == (name == "tied")
    replaced = changes(checkpoint)
    original = WholeModel(checkpoint, family, {}, CPU)
    reference = Reference(original, WINDOWS, batch_tokens=48)  # two windows a batch
    found = reference.compare(WholeModel(checkpoint, family, replaced, CPU))
    p, q = slow_log_probabilities(model, {}), slow_log_probabilities(model, replaced)
    losses, divergences = [], []
    for window, tokens in enumerate(WINDOWS):
        for position in range(12, 23):  # the second half but for its last token, which nothing follows
            losses.append(-float(q[window, position, tokens[position + 1]]))
            divergences.append(float((p[window, position].exp() * (p - q)[window, position]).sum()))
    assert found.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert found.kl_divergence == pytest.approx(np.mean(divergences), rel=1e-4)
    assert found.kl_divergence > 1e-3


def test_the_original_is_at_no_distance() -> None:
    checkpoint = Checkpoint.open(EXAMPLE)
    original = WholeModel(checkpoint, family_for(checkpoint.config), {}, CPU)
    found = Reference(original, WINDOWS).compare(original)
    assert found.kl_divergence == 0


PLAIN = ChatTemplate(None, {})


class Characters:
    """A tokenizer whose tokens are code points."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def test_chunks() -> None:
    text = Text(("abcdefghij",), "file.txt", "")
    cut = evaluation_chunks(Characters(), text, PLAIN, None, 3, None)
    np.testing.assert_array_equal(cut, [list(b"abc"), list(b"def"), list(b"ghi")])
    cut = evaluation_chunks(Characters(), text, PLAIN, 2, 3, bos=1)
    np.testing.assert_array_equal(cut, [[1, *b"bc"], [1, *b"ef"]])
    assert cut.dtype == np.int64
    with pytest.raises(D2QError, match=r"file.txt has 10 tokens, less than one chunk of 11"):
        evaluation_chunks(Characters(), text, PLAIN, 2, 11, None)
