"""Perplexity, KL divergence and top-1 agreement of GGUF files, by llama-perplexity's protocol.

The text is cut into chunks of `context` tokens; the first token of a chunk becomes BOS where the model has one; the
tokens of the second half are scored, each given all of the chunk before it. KL divergence is that of the file's
next-token distribution from the reference's, mean over the scored positions. Standard errors are those of
llama-perplexity, which takes the positions for independent; neighbours are a little less than that. Knows the
protocol; llama_model.py runs the files.
"""

import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from d2q_edge.calibration.text import Text, load_text
from d2q_edge.errors import D2QError
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.runtime.llama_model import LlamaModel

Floats = npt.NDArray[np.float64]
Logits = npt.NDArray[np.floating[Any]]
Reference = Callable[[int], Logits]
"""What the reference puts out for the chunk of that number, see `scored_logits`; a constant per row doesn't matter."""
TWO_SIDED = 1.96
"""Standard errors to each side of a 95 % interval."""
LEAST = 11
"""Values from which there are standard errors, as in llama-perplexity."""
ROWS = 64
"""Positions that are compared at a time: a large vocabulary in double precision fills the memory otherwise."""


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
        scored: positions that the numbers are means over.
        reference_perplexity_stderr: its standard error.
        perplexity_ratio: the file's perplexity over the reference's.
        perplexity_ratio_stderr: its standard error; small, because both see the same text.
        kl_divergence_stderr: standard error of the mean.
        kl_divergence_median, kl_divergence_max: over tokens.
        kl_divergence_p99_interval: 95 % confidence interval of the 99th percentile, by order statistics.
        top1_agreement_stderr: standard error of a share.
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
    scored: int = 0
    reference_perplexity_stderr: float | None = None
    perplexity_ratio: float | None = None
    perplexity_ratio_stderr: float | None = None
    kl_divergence_stderr: float | None = None
    kl_divergence_median: float | None = None
    kl_divergence_max: float | None = None
    kl_divergence_p99_interval: tuple[float, float] | None = None
    top1_agreement_stderr: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values for json.dump."""
        return asdict(self)

    def describe(self) -> str:
        """A short text for people: values with 95 % confidence intervals."""
        enough = self.scored >= LEAST
        lines = [f"perplexity      {_interval(self.perplexity, self.perplexity_stderr if enough else None, '.4f')}"]
        compared: tuple[tuple[str, float | None, float | None, str], ...] = (
            ("reference       ", self.reference_perplexity, self.reference_perplexity_stderr, ".4f"),
            ("ratio           ", self.perplexity_ratio, self.perplexity_ratio_stderr, ".5f"),
            ("KL divergence   ", self.kl_divergence_mean, self.kl_divergence_stderr, ".6f"),
            ("top-1 agreement ", self.top1_agreement, self.top1_agreement_stderr, ".2%"),
        )
        lines += [
            f"{name}{_interval(value, error if enough else None, form)}"
            for name, value, error, form in compared
            if value is not None
        ]
        if self.kl_divergence_p99 is not None and self.kl_divergence_p99_interval is not None:
            low, high = self.kl_divergence_p99_interval
            between = f" ({low:.4f} to {high:.4f})" if enough else ""
            lines.insert(4, f"  99 % of tokens below {self.kl_divergence_p99:.4f}{between}")
            lines.insert(5, f"  median {self.kl_divergence_median:.6f}, maximum {self.kl_divergence_max:.4f}")
        what = "in brackets: 95 % confidence, " if enough else "too few for confidence intervals: "
        lines.append(f"{what}from {self.scored:,} tokens in {self.chunks:,} chunks")
        lines.append(f"file            {self.bytes:,} bytes, {self.bits_per_weight:.4f} bits per weight")
        return "\n".join(lines)


def evaluate(
    path: str | Path,
    reference: str | Path | None = None,
    text: str = "builtin",
    chunks: int | None = None,
    context: int = 512,
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
    if context < 8 or (chunks is not None and chunks < 1):
        raise D2QError(f"context must be at least 8 and chunks at least 1, not {context} and {chunks}")
    path, reference = Path(path), None if reference is None else Path(reference)
    content = load_text(text, "evaluation")
    file = GGUFFile(path)
    file.check_blocks()
    if file.context_length is not None and context > file.context_length:
        print(
            f"the model was made for {file.context_length} tokens; after those, it doesn't know what to say",
            file=sys.stderr,
        )
    if reference is not None:
        GGUFFile(reference).check_blocks()
    with ExitStack() as stack:
        model = stack.enter_context(LlamaModel(path, context))
        base = stack.enter_context(LlamaModel(reference, context)) if reference is not None else None
        windows = cut(model, content, context, chunks)
        if base is None or reference is None:
            return measure(file, model, windows, None)
        check_same_tokens(path, model, windows, reference, base.vocab_size, cut(base, content, context, chunks))
        original = base
        return measure(file, model, windows, lambda index: scored_logits(original, windows[index]))


def measure(
    file: GGUFFile,
    model: LlamaModel,
    windows: npt.NDArray[np.int32],
    expected: Reference | None,
    keep: Callable[[int, Logits], None] | None = None,
) -> Evaluation:
    """Score all chunks, with a progress bar.

    Args:
        file: the opened file, for its size.
        model: the same, loaded.
        windows: int32 [chunks, context].
        expected: gives the reference's logits chunk by chunk; None without one.
        keep: is handed the file's own logits chunk by chunk; they are valid until it returns.

    Raises:
        D2QError: llama.cpp fails.
    """
    measured = _Measured()
    progress = tqdm(windows, desc=f"Evaluating {file.path.name}", unit="chunk", disable=None)
    for index, tokens in enumerate(progress):
        logits = scored_logits(model, tokens)
        measured.add(logits, tokens, expected(index) if expected else None)
        if keep is not None:
            keep(index, logits)
        progress.set_postfix(measured.state(), refresh=False)
    return measured.summary(len(windows), file.size, file.bits_per_weight)


def log_softmax(logits: Logits) -> Floats:
    """Log-probabilities, float64 [rows, vocab], of logits."""
    shifted: Floats = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def cut(model: LlamaModel, text: Text, context: int, limit: int | None) -> npt.NDArray[np.int32]:
    """A text as chunks of tokens, int32 [chunks, context], at most `limit` of them; BOS first where the model has one.

    Raises:
        D2QError: the text is shorter than one chunk.
    """
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


def check_same_tokens(
    path: Path,
    model: LlamaModel,
    windows: npt.NDArray[np.int32],
    reference: Path,
    vocab_size: int,
    expected: npt.NDArray[np.int32],
) -> None:
    """Make sure that a file and the reference can be compared token by token.

    Raises:
        D2QError: they split the text differently, or have vocabularies of different sizes.
    """
    if not np.array_equal(windows, expected):
        raise D2QError(f"{path} and {reference} split the text into different tokens; they are different models")
    if vocab_size != model.vocab_size:
        raise D2QError(f"{path} has {model.vocab_size} tokens and {reference} {vocab_size}; they are different models")


def scored_logits(model: LlamaModel, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """Logits at the scored positions of one chunk: float32 [positions, vocab], valid until the model's next call.

    Position i predicts the token len(tokens) // 2 + 1 + i. The logits after the last token predict a token that is not
    in the chunk; they are left out.
    """
    return model.logits(tokens, len(tokens) // 2)[:-1]


class _Measured:
    """Per-token results of all chunks so far."""

    def __init__(self) -> None:
        self.losses: list[Floats] = []
        self.base_losses: list[Floats] = []
        self.divergences: list[Floats] = []
        self.agreements: list[npt.NDArray[np.bool_]] = []

    def add(self, logits: Logits, tokens: npt.NDArray[np.int32], expected: Logits | None) -> None:
        """Score the second half of one chunk."""
        targets = tokens[len(tokens) // 2 + 1 :]
        for start in range(0, len(targets), ROWS):
            some = slice(start, start + ROWS)
            chosen = np.arange(len(targets[some])), targets[some]
            scores = log_softmax(logits[some])
            self.losses.append(-scores[chosen])
            if expected is not None:
                wanted = log_softmax(expected[some])
                self.base_losses.append(-wanted[chosen])
                self.agreements.append(scores.argmax(axis=1) == wanted.argmax(axis=1))
                self.divergences.append((np.exp(wanted) * (wanted - scores)).sum(axis=1))

    def state(self) -> dict[str, str]:
        """For the progress bar."""
        if self.divergences:
            return {"KLD": f"{np.concatenate(self.divergences).mean():.4f}"}
        return {"perplexity": f"{math.exp(np.concatenate(self.losses).mean()):.3f}"}

    def summary(self, chunks: int, size: int, bits_per_weight: float) -> Evaluation:
        losses = np.concatenate(self.losses)
        perplexity = math.exp(losses.mean())
        compared: dict[str, Any] = dict.fromkeys(
            ("reference_perplexity", "kl_divergence_mean", "kl_divergence_p99", "top1_agreement")
        )
        if self.divergences:
            base_losses, divergences = np.concatenate(self.base_losses), np.concatenate(self.divergences)
            agreement = float(np.concatenate(self.agreements).mean())
            reference, ratio = math.exp(base_losses.mean()), math.exp((losses - base_losses).mean())
            compared = {
                "reference_perplexity": reference,
                "reference_perplexity_stderr": reference * _stderr(base_losses),
                "perplexity_ratio": ratio,
                "perplexity_ratio_stderr": ratio * _stderr(losses - base_losses),
                "kl_divergence_mean": float(divergences.mean()),
                "kl_divergence_stderr": _stderr(divergences),
                "kl_divergence_p99": float(np.quantile(divergences, 0.99)),
                "kl_divergence_p99_interval": quantile_interval(divergences, 0.99),
                "kl_divergence_median": float(np.median(divergences)),
                "kl_divergence_max": float(divergences.max()),
                "top1_agreement": agreement,
                "top1_agreement_stderr": math.sqrt(agreement * (1 - agreement) / max(1, len(losses) - 1)),
            }
        return Evaluation(
            perplexity=perplexity,
            perplexity_stderr=perplexity * _stderr(losses),
            chunks=chunks,
            bytes=size,
            bits_per_weight=bits_per_weight,
            scored=len(losses),
            **compared,
        )


def quantile_interval(values: Floats, fraction: float) -> tuple[float, float]:
    """95 % confidence interval of a quantile, without assuming a distribution.

    How many of n values lie below the true quantile is binomial, so that its ends are the values of rank n f -/+ 1.96
    sqrt(n f (1 - f)), rounded up (Conover, Practical Nonparametric Statistics, section 3.2). With few values the upper
    end is the largest one, which is too low.
    """
    ordered = np.sort(values)
    center, spread = len(ordered) * fraction, TWO_SIDED * math.sqrt(len(ordered) * fraction * (1 - fraction))
    low, high = (min(max(math.ceil(rank), 1), len(ordered)) for rank in (center - spread, center + spread))
    return float(ordered[low - 1]), float(ordered[high - 1])


def _stderr(values: Floats) -> float:
    """Standard error of a mean, as llama-perplexity has it: none from fewer than 11 values."""
    return float(values.std() / math.sqrt(len(values) - 1)) if len(values) >= LEAST else 0.0


def _interval(value: float, error: float | None, form: str) -> str:
    if error is None:
        return f"{value:{form}}"
    half = TWO_SIDED * error
    return f"{value:{form}} ({value - half:{form}} to {value + half:{form}})"
