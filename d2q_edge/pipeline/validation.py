"""Estimate the quantized model's KL divergence on calibration text that took no part in quantizing.

Validation windows run through both models beside the calibration windows. After the last block their hidden states
become logits, and the second half of each window is scored, as in llama-perplexity's protocol. Embeddings and lm_head
are the original's on both sides, which those of the file are not quite.
"""

import math
from dataclasses import dataclass

import torch

from d2q_edge.calibration.hidden_states import StreamPair
from d2q_edge.distributed.process_group import ProcessGroup
from d2q_edge.formats.quantized_block import QuantizedBlock
from d2q_edge.quantize.kl_divergence import cap_logits, kl_divergence

LOGITS = 2**28
"""Bytes of logits at a time."""


@dataclass(frozen=True)
class Validation:
    """The quantized model's distance from the original.

    Attributes:
        tokens: number of positions.
        kl_divergence: mean over the positions, in nats.
        kl_divergence_stderr: its standard error.
        top1_agreement: share of positions where both models put the same token first.
    """

    tokens: int
    kl_divergence: float
    kl_divergence_stderr: float
    top1_agreement: float

    @staticmethod
    def of(divergences: torch.Tensor, agreements: torch.Tensor) -> "Validation":
        """Summarize positions: divergences, float64 [tokens], and agreements, 0 or 1 [tokens]."""
        count = len(divergences)
        stderr = float(divergences.std(correction=0)) / math.sqrt(max(1, count - 1))
        return Validation(count, float(divergences.mean()), stderr, float(agreements.double().mean()))


def validate(streams: StreamPair, final: QuantizedBlock, processes: ProcessGroup) -> Validation:
    """Compare both models after the last block; `final` is the result for final norm and lm_head."""
    runner = streams.runner
    family, norm, head = runner.family, runner.final_norm(), runner.head()
    bias = torch.zeros(1)
    if family.final_norm in final.norm_biases:
        bias = torch.from_numpy(final.norm_biases[family.final_norm])
        if family.head in final.column_scales:
            bias = bias / torch.from_numpy(final.column_scales[family.head])
    bias = bias.to(runner.device)
    context = streams.windows.shape[1]
    per_window = context - context // 2
    # Every process fills in its own batches; the others' are zero in the sum.
    divergences, agreements = torch.zeros(2, len(streams.windows) * per_window, dtype=torch.float64)
    for index in streams.own:
        start = sum(streams.sizes[:index]) * per_window
        here = slice(start, start + streams.sizes[index] * per_window)
        original = scored_positions(norm(runner.stream(streams.original[index])))
        quantized = scored_positions(norm(runner.stream(streams.quantized[index])) + bias)
        divergences[here], agreements[here] = compare_logits(original, quantized, head, cap=family.logit_cap)
    processes.all_reduce([divergences, agreements])
    return Validation.of(divergences, agreements)


def scored_positions(hidden: torch.Tensor) -> torch.Tensor:
    """Select the second half of every window: [windows, context, channels] to [tokens, channels]."""
    return hidden[:, hidden.shape[1] // 2 :].flatten(0, 1)


def compare_logits(
    original: torch.Tensor,
    quantized: torch.Tensor,
    head: torch.Tensor,
    logits_bytes: int = LOGITS,
    *,
    cap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare next-token distributions.

    Args:
        original, quantized: hidden states after the final norm, float32 [tokens, hidden].
        head: weight of the lm_head, float32 [vocabulary, hidden].
        logits_bytes: memory for logits at a time.
        cap: of the logits (`cap_logits`).

    Returns:
        KL divergences, float64 [tokens], and whether the same token comes first, bool [tokens]; on the CPU.
    """
    step = max(1, logits_bytes // (4 * 4 * len(head)))
    divergences, agreements = [], []
    for a, b in zip(original.split(step), quantized.split(step), strict=True):
        log_p, log_q = (cap_logits(states @ head.T, cap).log_softmax(-1) for states in (a, b))
        divergences.append(kl_divergence(log_p, log_q).cpu().double())
        agreements.append((log_p.argmax(-1) == log_q.argmax(-1)).cpu())
    return torch.cat(divergences), torch.cat(agreements)
