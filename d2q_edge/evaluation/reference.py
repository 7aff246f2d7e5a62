"""What the original model predicts for a text, computed once and kept on disk while other files are compared with it.

Two large models at a time don't fit into every memory; one model and a file do, and the original runs once, not once
per file. Log-probabilities are kept in half precision: that changes a KL divergence by about 1e-6. Knows where and how
they are kept; evaluation.py makes and uses them.
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
from d2q_edge.evaluation.perplexity import Evaluation, Logits, check_same_tokens, cut, log_softmax, measure
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.runtime.llama_model import LlamaModel

SMALLEST = -60000.0
"""Log-probabilities of tokens that are impossible; half precision ends there."""


@dataclass(frozen=True)
class Reference:
    """The original on one text.

    Attributes:
        path: its file.
        text: what it was measured on.
        windows: the text as chunks of tokens, int32 [chunks, context].
        scores: log-probabilities at the scored positions, float16 [chunks, positions, vocab], mapped from disk.
        evaluation: its own perplexity and size.
    """

    path: Path
    text: Text
    windows: npt.NDArray[np.int32]
    scores: npt.NDArray[np.float16]
    evaluation: Evaluation

    def evaluate(self, path: Path) -> Evaluation:
        """Measure a file, and its distance from this one.

        Raises:
            D2QError: it can't be read or loaded, or is another model.
        """
        file, (chunks, context) = GGUFFile(path), self.windows.shape
        with LlamaModel(path, context) as model:
            windows = cut(model, self.text, context, chunks)
            check_same_tokens(path, model, windows, self.path, self.scores.shape[2], self.windows)
            return measure(file, model, windows, lambda index: self.scores[index])


@contextmanager
def reference(path: Path, text: Text, chunks: int | None, context: int, directory: Path) -> Iterator[Reference]:
    """Run the original on a text, and keep what it predicts for as long as the with block lasts.

    Args:
        path: its GGUF file.
        text: what to measure on.
        chunks: at most that many; None takes the whole text.
        context: tokens per chunk.
        directory: where there is room.

    Raises:
        D2QError: the file can't be loaded, the text is too short, or the disk has no room.
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
                scores[index, row] = np.maximum(log_softmax(values[None])[0], SMALLEST)

        evaluation = measure(file, model, windows, None, keep)
    try:
        yield Reference(path, text, windows, scores, evaluation)
    finally:
        kept.unlink(missing_ok=True)
