"""Run the original model on a text once, and keep its log-probabilities on disk to compare several files with them.

Two large models don't always fit into memory together. Half precision changes a KL divergence by about 1e-6.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from d2q_edge.calibration.text import Text
from d2q_edge.errors import D2QError
from d2q_edge.evaluation.perplexity import Evaluation, check_same_tokens, cut, measure
from d2q_edge.evaluation.token_scores import Logits, Tokens, log_softmax
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.runtime.llama_model import LlamaModel

MIN_LOG_PROBABILITY = -60000.0
"""Half precision ends there."""


@dataclass(frozen=True)
class Reference:
    """The original model's predictions for one text.

    Attributes:
        path: its GGUF file.
        text: what it was measured on.
        windows: its tokens in chunks, int32 [chunks, context].
        scores: log-probabilities at the scored positions, float16 [chunks, positions, vocab], mapped from disk.
        evaluation: its own perplexity and size.
    """

    path: Path
    text: Text
    windows: Tokens
    scores: npt.NDArray[np.float16]
    evaluation: Evaluation

    def evaluate(self, path: Path) -> Evaluation:
        """Measure a file, and its distance from the original; errors as in perplexity.evaluate."""
        file, (chunks, context) = GGUFFile(path), self.windows.shape
        with LlamaModel(path, context) as model:
            windows = cut(model, self.text, context, chunks)
            check_same_tokens(path, model, windows, self.path, self.scores.shape[2], self.windows)
            return measure(file, model, windows, lambda index: self.scores[index])


@contextmanager
def reference(path: Path, text: Text, chunks: int | None, context: int, directory: Path) -> Iterator[Reference]:
    """Run the original model on a text, and keep its predictions in a directory inside the with block.

    Args:
        path: its GGUF file.
        text: what to measure on.
        chunks: limit of their number; None takes the whole text.
        context: tokens per chunk.
        directory: where they are kept, in 2 * chunks * positions * vocab bytes.

    Raises:
        D2QError: the file can't be loaded, the text is too short, or the disk is too full.
    """
    file = GGUFFile(path)
    with LlamaModel(path, context) as model:
        windows = cut(model, text, context, chunks)
        shape = len(windows), context - context // 2 - 1, model.vocab_size
        kept = directory / "reference.f16"
        size, free = 2 * int(np.prod(shape, dtype=np.int64)), shutil.disk_usage(directory).free
        if size > free:
            raise D2QError(
                f"the original's predictions for {len(windows)} chunks take {size:,} bytes in {directory}, which has "
                f"{free:,}; use --chunks {max(1, int(len(windows) * free / size / 2))}, or set XDG_CACHE_HOME"
            )
        try:
            scores = np.memmap(kept, np.float16, "w+", shape=shape)
        except OSError as error:
            raise D2QError(f"can't write {kept}: {error.strerror or error}") from error

        def keep(index: int, logits: Logits) -> None:
            for row, values in enumerate(logits):
                scores[index, row] = np.maximum(log_softmax(values[None])[0], MIN_LOG_PROBABILITY)

        evaluation = measure(file, model, windows, on_logits=keep)
    try:
        yield Reference(path, text, windows, scores, evaluation)
    finally:
        kept.unlink(missing_ok=True)
