"""Compute the KL divergence between the next-token distributions of two models, and its gradient."""

import torch

LOGITS = 2**28
"""Bytes of one matrix of logits at a time: all logits of a batch would not fit."""


def cap_logits(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """Return cap * tanh(logits / cap), between -cap and cap, of floats of any shape; without a cap (0) the logits."""
    return torch.tanh(logits / cap) * cap if cap else logits


def kl_divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Return sum_v p_v (log p_v - log q_v), in nats, [...].

    Args:
        log_p, log_q: log-probabilities of the original and the quantized model, floats [..., vocabulary].
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@torch.no_grad()
def head_divergence(
    expected: torch.Tensor, found: torch.Tensor, head: torch.Tensor, *, logits_bytes: int = LOGITS, cap: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare next-token distributions some tokens at a time, with the gradient formed at once: q - p by the logits.

    By what is capped, that is times the slope of the cap, 1 - tanh^2.

    Args:
        expected, found: inputs of the lm_head in the original and in the quantized model, floats [tokens, hidden].
        head: weight of the lm_head, float32 [vocabulary, hidden].
        logits_bytes: memory of one matrix of logits.
        cap: of the logits (`cap_logits`).

    Returns:
        The sum of the KL divergences in nats, a float64 scalar, and its gradient by `found`, float32 [tokens, hidden].
    """
    total = torch.zeros((), dtype=torch.float64, device=head.device)
    gradients = []
    step = max(1, logits_bytes // (4 * len(head)))
    for a, b in zip(expected.split(step), found.split(step), strict=True):
        logits = cap_logits(b.float() @ head.T, cap)
        log_p, log_q = cap_logits(a.float() @ head.T, cap).log_softmax(-1), logits.log_softmax(-1)
        total += kl_divergence(log_p, log_q).sum(dtype=torch.float64)
        gradient = log_q.exp_().sub_(log_p.exp_())
        if cap:
            gradient *= 1 - (logits / cap).square_()
        gradients.append(gradient @ head)
    return total, torch.cat(gradients)
