"""Measure perplexity and KL divergence of dequantized weights in torch, without a file and without the runtime.

The protocol is llama-perplexity's, as in evaluation/perplexity.py: chunks of equal length, the second half scored.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from d2q_edge.calibration.chat_template import ChatTemplate
from d2q_edge.calibration.text import Text
from d2q_edge.calibration.windows import cut_windows
from d2q_edge.errors import D2QError
from d2q_edge.quantize.kl_divergence import kl_divergence
from tools.whole_model import WholeModel

BATCH_TOKENS = 4096
"""Tokens per forward pass."""


@dataclass(frozen=True)
class Distance:
    """Perplexity on one text, and KL divergence from the original model in nats per token."""

    perplexity: float
    kl_divergence: float


def evaluation_chunks(
    tokenizer: Any, text: Text, template: ChatTemplate, chunks: int | None, context: int, bos: int | None
) -> npt.NDArray[np.int64]:
    """Tokenize a text and cut it into chunks.

    Args:
        tokenizer: of the model, from transformers.
        text: the text.
        template: renders its conversations.
        chunks: at most so many; None for all.
        context: tokens per chunk.
        bos: replaces the first token of each chunk, if there is one.

    Returns:
        int64 [chunks, context].

    Raises:
        D2QError: the text is shorter than one chunk.
    """
    content = text.render(template)
    ids = np.array(tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
    windows = cut_windows(ids, context, bos)
    if not len(windows):
        raise D2QError(
            f"the text {text.source} has {len(ids)} tokens, less than one chunk of {context}; use a longer one"
        )
    return windows[: chunks or None]


def scored_states(model: WholeModel, tokens: torch.Tensor) -> torch.Tensor:
    """Return `WholeModel.states` where the next token is scored: [windows, context - context // 2 - 1, hidden]."""
    return model.states(tokens)[:, tokens.shape[1] // 2 : -1]


class Reference:
    """The original model on one text. It keeps the lm_head's inputs, a fraction of the size of its probabilities."""

    @torch.inference_mode()
    def __init__(self, model: WholeModel, windows: npt.NDArray[np.int64], *, batch_tokens: int = BATCH_TOKENS) -> None:
        """Run the original model on windows [windows, context], so many tokens per forward pass."""
        self._model = model
        self._batches = torch.from_numpy(windows).split(max(1, batch_tokens // windows.shape[1]))
        self._states = [scored_states(model, tokens) for tokens in self._batches]

    @torch.inference_mode()
    def compare(self, model: WholeModel) -> Distance:
        """Measure another model with the same vocabulary."""
        loss = divergence = torch.zeros((), dtype=torch.float64, device=model.device)
        count = 0
        for tokens, states in zip(self._batches, self._states, strict=True):
            expected = self._model.log_probabilities(states)
            found = model.log_probabilities(scored_states(model, tokens))
            targets = tokens[:, tokens.shape[1] // 2 + 1 :, None].to(model.device)
            loss = loss - found.gather(-1, targets).sum(dtype=torch.float64)
            divergence = divergence + kl_divergence(expected, found).sum(dtype=torch.float64)
            count += targets.numel()
        return Distance(math.exp(float(loss) / count), float(divergence) / count)
