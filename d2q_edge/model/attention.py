"""Choose how transformers' modules compute attention on each kind of device."""

from typing import Any

import torch

QUERIES = 128
"""Queries at a time on a CPU."""


def attention_for(device: torch.device) -> str:
    """Return the name of the attention implementation for a device, registered with transformers.

    On CUDA it is bfloat16, whose kernels are ten times as fast as float32's. On a CPU it is float32, some queries at a
    time with the keys that they may see: torch's kernel computes nearly all of what a causal mask hides (0.7 of its
    time at 512 tokens, 0.93 at 2048).
    """
    if device.type not in ("cpu", "cuda"):
        return "sdpa"
    from transformers import AttentionInterface

    name, function = ("sdpa_bfloat16", _bfloat16) if device.type == "cuda" else ("sdpa_by_queries", _by_queries)
    AttentionInterface.register(name, function)
    return name


def _bfloat16(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    output, _ = sdpa_attention_forward(module, query.bfloat16(), key.bfloat16(), value.bfloat16(), *rest, **options)
    return output.to(query.dtype), None


def _by_queries(
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    **_options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend to what a mask, bool [1, 1, context, context], shows, and never to later tokens; None shows all others.

    Query is [windows, heads, context, channels], key and value likewise with as many heads or fewer; the output has
    heads and context the other way round.
    """
    context = query.shape[2]
    if mask is None:
        mask = torch.ones(1, 1, context, context, dtype=torch.bool, device=query.device).tril()
    outputs = []
    for start in range(0, context, QUERIES):
        stop = min(start + QUERIES, context)
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(
                query[:, :, start:stop],
                key[:, :, :stop],
                value[:, :, :stop],
                attn_mask=mask[:, :, start:stop, :stop],
                scale=scaling,
                enable_gqa=key.shape[1] != query.shape[1],
            )
        )
    return torch.cat(outputs, 2).transpose(1, 2), None
