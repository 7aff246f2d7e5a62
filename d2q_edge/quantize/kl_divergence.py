"""Compute the KL divergence between two models' next-token distributions."""

import torch


def kl_divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Return sum_v p_v (log p_v - log q_v), in nats.

    Args:
        log_p: log-probabilities of the original model, floats [..., vocabulary].
        log_q: log-probabilities of the quantized model, of the same shape.

    Returns:
        Floats [...], one value per position.
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1)
