"""Compute the KL divergence between the next-token distributions of two models."""

import torch


def kl_divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Return sum_v p_v (log p_v - log q_v), in nats, [...].

    Args:
        log_p, log_q: log-probabilities of the original and the quantized model, floats [..., vocabulary].
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1)
