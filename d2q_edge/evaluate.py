"""Perplexity, KL divergence and top-1 agreement of GGUF files, by llama-perplexity's protocol.

The text is cut into chunks of `context` tokens; the first token of a chunk becomes BOS where the model has one; the
tokens of the second half are scored, each given all of the chunk before it. KL divergence is that of the file's
next-token distribution from the reference's, mean over the scored positions. Knows the protocol; llama_model.py runs
the files.
"""

import math
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from d2q_edge.calibration import Text, load_text
from d2q_edge.errors import D2QError
from d2q_edge.gguf_reader import GGUFFile
from d2q_edge.llama_model import LlamaModel

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    """Results; the fields that compare with a reference are None without one.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of the scored tokens.
        perplexity_stderr: its standard error.
        reference_perplexity: of the reference.
        kl_divergence_mean: in nats per token.
        kl_divergence_p99: its 99th percentile over tokens.
        top1_agreement: share of positions where both files put the same token first.
        chunks: evaluated.
        bytes: size of the file.
        bits_per_weight: of the file's tensors.
    """

    perplexity: float
    perplexity_stderr: float
    reference_perplexity: float | None
    kl_divergence_mean: float | None
    kl_divergence_p99: float | None
    top1_agreement: float | None
    chunks: int
    bytes: int
    bits_per_weight: float

    def to_json(self) -> dict[str, Any]:
        """Plain values for json.dump."""
        return asdict(self)


def evaluate(
    path: Path, reference: Path | None = None, text: str = "builtin", chunks: int | None = None, context: int = 512
) -> Evaluation:
    """Measure one file, and its distance from another one.

    Args:
        path: the GGUF file.
        reference: the file that it should equal, usually the F16 one.
        text: a text file, or "builtin".
        chunks: at most that many; None takes the whole text.
        context: tokens per chunk.

    Raises:
        D2QError: a file can't be read or loaded, the text is too short, or the two files' tokens differ.
    """
    content = load_text(text, "evaluation")
    file = GGUFFile(path)
    file.check_blocks()
    if reference is not None:
        GGUFFile(reference).check_blocks()
    with ExitStack() as stack:
        model = stack.enter_context(LlamaModel(path, context))
        base = stack.enter_context(LlamaModel(reference, context)) if reference is not None else None
        windows = _chunks(model, content, context, chunks)
        if base is not None and not np.array_equal(windows, _chunks(base, content, context, chunks)):
            raise D2QError(f"{path} and {reference} split the text into different tokens; they are different models")
        if base is not None and base.vocab_size != model.vocab_size:
            raise D2QError(
                f"{path} has {model.vocab_size} tokens and {reference} {base.vocab_size}; they are different models"
            )
        measured = _Measured()
        for tokens in tqdm(windows, desc=f"Evaluating {path.name}", unit="chunk", disable=None):
            measured.add(model, base, tokens)
    return measured.summary(len(windows), file.size, file.bits_per_weight)


def log_softmax(logits: npt.NDArray[np.float32]) -> Floats:
    """Log-probabilities, float64 [rows, vocab], of logits."""
    shifted: Floats = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _chunks(model: LlamaModel, text: Text, context: int, limit: int | None) -> npt.NDArray[np.int32]:
    tokens = model.tokenize(text.content)
    count = len(tokens) // context
    if count == 0:
        raise D2QError(
            f"the text has {len(tokens)} tokens, less than one chunk of {context}; use a longer --text or a smaller "
            "--context"
        )
    windows = tokens[: context * min(count, limit or count)].reshape(-1, context)
    if model.bos is not None:
        windows[:, 0] = model.bos
    return windows


class _Measured:
    """Per-token results of all chunks so far."""

    def __init__(self) -> None:
        self.losses: list[Floats] = []
        self.base_losses: list[Floats] = []
        self.divergences: list[Floats] = []
        self.agreements: list[npt.NDArray[np.bool_]] = []

    def add(self, model: LlamaModel, base: LlamaModel | None, tokens: npt.NDArray[np.int32]) -> None:
        """Score the second half of one chunk."""
        first = len(tokens) // 2
        targets = tokens[first + 1 :]
        rows = np.arange(len(targets))
        # The logits after the last token predict a token that is not in the chunk.
        scores = log_softmax(model.logits(tokens, first)[:-1])
        self.losses.append(-scores[rows, targets])
        if base is not None:
            expected = log_softmax(base.logits(tokens, first)[:-1])
            self.base_losses.append(-expected[rows, targets])
            self.agreements.append(scores.argmax(axis=1) == expected.argmax(axis=1))
            self.divergences.append((np.exp(expected) * (expected - scores)).sum(axis=1))

    def summary(self, chunks: int, size: int, bits_per_weight: float) -> Evaluation:
        losses = np.concatenate(self.losses)
        perplexity = math.exp(losses.mean())
        compared = bool(self.divergences)
        divergences = np.concatenate(self.divergences) if compared else np.zeros(1)
        return Evaluation(
            perplexity=perplexity,
            perplexity_stderr=perplexity * float(losses.std() / math.sqrt(len(losses) - 1)),
            reference_perplexity=math.exp(np.concatenate(self.base_losses).mean()) if compared else None,
            kl_divergence_mean=float(divergences.mean()) if compared else None,
            kl_divergence_p99=float(np.quantile(divergences, 0.99)) if compared else None,
            top1_agreement=float(np.concatenate(self.agreements).mean()) if compared else None,
            chunks=chunks,
            bytes=size,
            bits_per_weight=bits_per_weight,
        )
