"""Load a GGUF file, and continue a prompt; no chat template is read."""

from collections.abc import Iterator
from pathlib import Path

from d2q_edge.errors import D2QError
from d2q_edge.options import LOADING, SAMPLING, LoadOptions, SamplingOptions
from d2q_edge.runtime.text_model import TextModel

SPARE_TOKENS = 8
"""Room for the special tokens around a prompt."""


def generate(
    path: Path,
    prompt: str,
    max_tokens: int,
    temperature: float,
    seed: int,
    threads: int | None = None,
    *,
    context: int | None = None,
    sampling: SamplingOptions = SAMPLING,
    loading: LoadOptions = LOADING,
) -> Iterator[str]:
    """Load a model, and return an iterator over pieces of the text that continues a prompt.

    Args:
        path: the GGUF file.
        prompt: plain text; no chat template is applied.
        max_tokens: limit of generated tokens; the model may end the text earlier.
        temperature: of the sampling; 0 always takes the most likely token.
        seed: of the sampling.
        threads: number of CPU threads; None takes all CPUs that this process may use.
        context: tokens of prompt and continuation; None is what they need. The model's own context is the limit.
        sampling: which tokens are candidates.
        loading: adapters, types of the KV cache, repacking.

    Raises:
        D2QError: the runtime is not installed, the file can't be loaded, or the prompt is empty, not UTF-8, or longer
            than the context.
    """
    try:
        length = len(prompt.encode())
    except UnicodeEncodeError as error:
        raise D2QError("the prompt isn't valid UTF-8; give it in that encoding") from error
    # A token is at least a byte long. The model's own context can need a KV cache that doesn't fit in memory.
    model = TextModel(path, context or length + max_tokens + SPARE_TOKENS, threads, loading)
    return _pieces(model, prompt, max_tokens, temperature, seed, sampling)


def _pieces(
    model: TextModel, prompt: str, max_tokens: int, temperature: float, seed: int, sampling: SamplingOptions
) -> Iterator[str]:
    with model:
        tokens = model.tokenize(prompt, read_special=True)
        if not tokens:
            raise D2QError("the prompt is empty, and the model has no token that begins a text; give some text")
        yield from model.continuation(tokens, max_tokens, temperature, seed, sampling)
