"""Logits of transformers' own models in float64, for tests of changes that must not change what a model computes."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

TOKENS = torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def float64_logits(directory: Path, tensors: Mapping[str, torch.Tensor], *, tied: bool) -> torch.Tensor:
    """Logits [2, 24, vocabulary] of TOKENS, of the model in `directory` with these tensors, which must be all it has.

    `tied` replaces tie_word_embeddings of config.json.
    """
    config = AutoConfig.from_pretrained(directory)
    config.tie_word_embeddings = tied
    # Not "eager", whose softmax is in float32.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="sdpa").eval()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            # transformers' own rounds its input to float32.
            module.forward = partial(_rms_norm, module)
    result = model.load_state_dict({name: tensor.double() for name, tensor in tensors.items()}, strict=False)
    assert not result.unexpected_keys
    assert result.missing_keys == (["lm_head.weight"] if tied else [])
    logits: torch.Tensor = model(TOKENS).logits
    assert logits.dtype == torch.float64
    return logits


def _rms_norm(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    scaled: torch.Tensor = hidden * (hidden.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()
    weighted: torch.Tensor = scaled * module.weight
    return weighted


def relative_difference(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute expected value."""
    return float((result - expected).abs().max() / expected.abs().max())
