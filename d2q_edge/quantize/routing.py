"""Which calibration tokens an expert is quantized for.

Those that the original model's router sends to it. With few of them it would be fitted to their noise: error feedback
estimates a covariance of all inputs, which takes several times as many tokens as there are inputs, whereas with about
as many it is at its worst. So an expert is also given the tokens for which it came nearest to being chosen, until it
has MINIMUM_SHARE for each input.

Knows probabilities. Does not know experts or where the tokens come from (expert_pipeline.py).
"""

import torch

MINIMUM_SHARE = 4
"""Tokens of an expert per input, at least. Measured with tokens of qwen3-34m (512 channels) in 48 clusters for experts:
the squared error on other tokens of the cluster, relative to the output, from 128 tokens of it is 0.052; with the next
ones added up to 512 in all 0.046, up to 1024 0.033, 2048 0.029, 4096 0.028, 8192 0.029. From 1024 tokens of the cluster
it is 0.026; with others up to 2048 0.024, 4096 0.024, 8192 0.025."""


def top_up(probabilities: torch.Tensor, routed: torch.Tensor, minimum: int) -> torch.Tensor:
    """The tokens of every expert, bool [tokens, experts].

    Args:
        probabilities: of the router, float32 [tokens, experts].
        routed: bool [tokens, experts], the tokens that an expert sees in the model; they are always among its tokens.
        minimum: tokens that every expert should have, as far as there are so many. Those with the highest probabilities
            are added, among equals the first.
    """
    chosen = routed.clone()
    missing = (min(minimum, len(routed)) - routed.sum(0)).tolist()
    for expert, count in enumerate(missing):
        if count > 0:
            others = probabilities[:, expert].masked_fill(routed[:, expert], -1.0)
            chosen[others.argsort(descending=True, stable=True)[:count], expert] = True
    return chosen
