"""Measure perplexity, KL divergence and top-1 agreement of a GGUF file, by llama-perplexity's protocol.

The text is cut into chunks of `context` tokens; the first token of a chunk becomes BOS where the model has one; the
tokens of the second half are scored, each given all of the chunk before it. Positions count as independent, as in
llama-perplexity; neighbors are a little less than that.
"""

import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from d2q_edge.calibration.text import Text, load_evaluation
from d2q_edge.calibration.windows import cut_windows
from d2q_edge.errors import D2QError
from d2q_edge.evaluation import token_scores
from d2q_edge.evaluation.token_scores import Floats, Logits, Tokens, stderr
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.options import LOADING, MIN_CONTEXT, ComparisonOptions, LoadOptions
from d2q_edge.runtime.llama_model import LlamaModel
from d2q_edge.utils.progress import INTERVAL, Progress

MAX_LOSS = 700.0  # nats per token; exp of more is no float


@dataclass(frozen=True)
class Evaluation:
    """Results; those that compare with a reference are None without one. All `_stderr` are standard errors.

    Attributes:
        perplexity, reference_perplexity: exp of the mean negative log-likelihood of the scored tokens.
        kl_divergence_mean: of the file's predictions from the reference's, in nats per token. The 99 % quantile (p99),
            median and maximum are over tokens, too.
        top1_agreement: share of positions where both files have the same most likely token.
        chunks: number of chunks.
        bytes: size of the file.
        bits_per_weight: of the file's tensors.
        scored: number of positions that the results are means over.
        perplexity_ratio: the file's perplexity over the reference's; both see the same text, so its error is small.
        kl_divergence_p99_interval: 95 % confidence interval, by order statistics.
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
        """Return plain values for json.dump."""
        return asdict(self)

    def describe(self) -> str:
        """Format the results for a terminal, with 95 % confidence intervals."""
        enough = self.scored >= token_scores.MIN_VALUES
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
    text: str = ComparisonOptions.text,
    chunks: int | None = None,
    context: int = ComparisonOptions.context,
    *,
    loading: LoadOptions = LOADING,
    reference_lora: tuple[str, ...] = (),
) -> Evaluation:
    """Measure one file, and its distance from a reference.

    Args:
        path: the GGUF file.
        reference: the GGUF file of the original model, usually in F16.
        text: path of a text file, or of a .jsonl file of conversations, or "builtin".
        chunks: limit of their number; None takes the whole text.
        context: tokens per chunk.
        loading: adapters of the file, types of the KV cache, repacking.
        reference_lora: adapters of the reference.

    Raises:
        D2QError: a file can't be read or loaded, the text is too short, or the two files' tokens differ.
    """
    if context < MIN_CONTEXT or (chunks is not None and chunks < 1):
        raise D2QError(f"context must be at least {MIN_CONTEXT} and chunks at least 1, not {context} and {chunks}")
    path, reference = Path(path), None if reference is None else Path(reference)
    content = load_evaluation(text)
    file = GGUFFile(path)
    file.check_blocks()
    if file.context_length is not None and context > file.context_length:
        print(f"the model was trained for {file.context_length} tokens; it can't predict what follows", file=sys.stderr)
    if reference is not None:
        GGUFFile(reference).check_blocks()
    with ExitStack() as stack:
        model = stack.enter_context(LlamaModel(path, context, options=loading))
        windows = cut(model, content, context, chunks)
        if reference is None:
            return measure(file, model, windows)
        base = stack.enter_context(LlamaModel(reference, context, options=replace(loading, lora=reference_lora)))
        check_same_tokens(path, model, windows, reference, base.vocab_size, cut(base, content, context, chunks))
        return measure(file, model, windows, lambda index: scored_logits(base, windows[index]))


def measure(
    file: GGUFFile,
    model: LlamaModel,
    windows: Tokens,
    reference: Callable[[int], Logits] | None = None,
    on_logits: Callable[[int, Logits], None] | None = None,
    *,
    interval: float = INTERVAL,
) -> Evaluation:
    """Score all chunks of a text.

    Args:
        file: the opened file, for its size.
        model: the same, loaded.
        windows: chunks, int32 [chunks, context].
        reference: returns the reference's logits of chunk i, see scored_logits.
        on_logits: is called with i and the file's logits of chunk i, which are valid until it returns.
        interval: seconds between two lines of progress where stderr is no terminal.

    Raises:
        D2QError: llama.cpp fails.
    """
    scores: list[Floats] = []
    with Progress(f"Evaluating {file.path.name}", len(windows), "chunk", interval=interval) as progress:
        for index, tokens in enumerate(windows):
            logits = scored_logits(model, tokens)
            targets = tokens[len(tokens) // 2 + 1 :]
            scores.append(token_scores.score_tokens(logits, targets, reference(index) if reference else None))
            losses = scores[-1][:2].mean(axis=1)  # of the file and the reference
            if not (losses < MAX_LOSS).all():
                raise D2QError(f"{file.path} or its reference is damaged: loss {losses.max():g} in chunk {index + 1}")
            if on_logits is not None:
                on_logits(index, logits)
            means = np.concatenate(scores, axis=1).mean(axis=1)
            progress.set_status(f"KLD {means[2]:.4f}" if reference else f"perplexity {math.exp(means[0]):.3f}")
            progress.update()
    return _summarize(np.concatenate(scores, axis=1), len(windows), file)


def cut(model: LlamaModel, text: Text, context: int, limit: int | None) -> Tokens:
    """Tokenize a text into at most `limit` chunks, int32 [chunks, context], with BOS first where the model has one.

    Raises:
        D2QError: the text is shorter than one chunk.
    """
    template = model.chat_template
    content = text.render(template)
    for note in template.notes:
        print(note, file=sys.stderr)
    found = model.tokenize(content, add_special=not text.has_conversations, read_special=text.has_conversations)
    tokens = np.array(found, dtype=np.int32)
    windows = cut_windows(tokens, context, model.bos)
    if not len(windows):
        raise D2QError(
            f"the text has {len(tokens)} tokens, less than one chunk of {context}; use a longer --text or a smaller "
            "--context"
        )
    return windows[: limit or None]


def check_same_tokens(
    path: Path, model: LlamaModel, windows: Tokens, reference: Path, vocab_size: int, expected: Tokens
) -> None:
    """Raise a D2QError unless a file has the chunks and the vocab_size that are expected from the reference."""
    if not np.array_equal(windows, expected):
        raise D2QError(f"{path} and {reference} split the text into different tokens; they are different models")
    if vocab_size != model.vocab_size:
        raise D2QError(f"{path} has {model.vocab_size} tokens and {reference} {vocab_size}; they are different models")


def scored_logits(model: LlamaModel, tokens: Tokens) -> Logits:
    """Run one chunk, int32 [context], and return the logits of its scored positions: float32 [positions, vocab].

    They are valid until the model's next call. Position i predicts the token len(tokens) // 2 + 1 + i. The last token's
    logits predict a token after the chunk; they are left out.
    """
    return model.logits(tokens, len(tokens) // 2)[:-1]


def _summarize(scores: Floats, chunks: int, file: GGUFFile) -> Evaluation:
    """Reduce the scores of all tokens, see score_tokens."""
    losses, *others = scores
    perplexity = math.exp(losses.mean())
    names = ("reference_perplexity", "kl_divergence_mean", "kl_divergence_p99", "top1_agreement")
    compared: dict[str, Any] = dict.fromkeys(names)
    if others:
        base_losses, divergences, agreements = others
        agreement = float(agreements.mean())
        reference, ratio = math.exp(base_losses.mean()), math.exp((losses - base_losses).mean())
        compared = {
            "reference_perplexity": reference,
            "reference_perplexity_stderr": reference * stderr(base_losses),
            "perplexity_ratio": ratio,
            "perplexity_ratio_stderr": ratio * stderr(losses - base_losses),
            "kl_divergence_mean": float(divergences.mean()),
            "kl_divergence_stderr": stderr(divergences),
            "kl_divergence_p99": float(np.quantile(divergences, 0.99)),
            "kl_divergence_p99_interval": token_scores.quantile_interval(divergences, 0.99),
            "kl_divergence_median": float(np.median(divergences)),
            "kl_divergence_max": float(divergences.max()),
            "top1_agreement": agreement,
            "top1_agreement_stderr": math.sqrt(agreement * (1 - agreement) / max(1, len(losses) - 1)),
        }
    return Evaluation(
        perplexity=perplexity,
        perplexity_stderr=perplexity * stderr(losses),
        chunks=chunks,
        bytes=file.size,
        bits_per_weight=file.bits_per_weight,
        scored=len(losses),
        **compared,
    )


def _interval(value: float, error: float | None, form: str) -> str:
    if error is None:
        return f"{value:{form}}"
    half = token_scores.TWO_SIDED * error
    return f"{value:{form}} ({value - half:{form}} to {value + half:{form}})"
