"""Compute the KL divergence between the next-token distributions of two models, and its gradient."""

import torch

LOGITS = 2**28
"""Bytes of one matrix of logits at a time: all logits of a batch would not fit."""


def kl_divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Return sum_v p_v (log p_v - log q_v), in nats, [...].

    Args:
        log_p, log_q: log-probabilities of the original and the quantized model, floats [..., vocabulary].
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@torch.no_grad()
def head_divergence(
    expected: torch.Tensor, found: torch.Tensor, head: torch.Tensor, *, logits_bytes: int = LOGITS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare next-token distributions some tokens at a time, with the gradient formed at once: q - p by the logits.

    Args:
        expected, found: inputs of the lm_head in the original and in the quantized model, floats [tokens, hidden].
        head: weight of the lm_head, float32 [vocabulary, hidden].
        logits_bytes: memory of one matrix of logits.

    Returns:
        The sum of the KL divergences in nats, a float64 scalar, and its gradient by `found`, float32 [tokens, hidden].
    """
    total = torch.zeros((), dtype=torch.float64, device=head.device)
    gradients = []
    step = max(1, logits_bytes // (4 * len(head)))
    for a, b in zip(expected.split(step), found.split(step), strict=True):
        log_p, log_q = ((states.float() @ head.T).log_softmax(-1) for states in (a, b))
        total += kl_divergence(log_p, log_q).sum(dtype=torch.float64)
        gradients.append(log_q.exp_().sub_(log_p.exp_()) @ head)
    return total, torch.cat(gradients)
