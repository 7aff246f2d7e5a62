"""Load a GGUF file with llama-cpp-python's high-level API, and continue a prompt."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from d2q_edge import runtime
from d2q_edge.errors import D2QError
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.utils.machine import usable_cpus

SPARE_TOKENS = 8
"""Room for the special tokens around a prompt."""


def llama_options(file: GGUFFile, context: int, threads: int | None) -> dict[str, Any]:
    """Return options of llama_cpp.Llama: a context within the model's own, and threads; None takes all usable CPUs."""
    n_ctx, count = min(context, file.context_length or context), threads or usable_cpus()
    return {"n_ctx": n_ctx, "n_threads": count, "n_threads_batch": count, "verbose": False}


def load(path: Path, context: int, seed: int | None = None, threads: int | None = None) -> Any:
    """Open a file as a llama_cpp.Llama, which the caller closes.

    Args:
        path: the GGUF file.
        context: n_ctx, tokens of prompt and answer together; limited to the model's own context.
        seed: of the sampling; None takes a random one.
        threads: number of CPU threads; None takes all CPUs that this process may use.

    Raises:
        D2QError: the runtime is not installed, or the file can't be loaded.
    """
    api: Any = runtime.require()
    file = GGUFFile(path)
    file.check_blocks()
    try:
        seed = api.LLAMA_DEFAULT_SEED if seed is None else seed
        return api.Llama(str(path), seed=seed, **llama_options(file, context, threads))
    except Exception as error:
        # llama.cpp's ValueError, or whatever jinja2 raises for an untrusted chat template.
        raise D2QError(f"llama.cpp can't load {path}: {error}") from error


def generate(
    path: Path, prompt: str, max_tokens: int, temperature: float, seed: int, threads: int | None = None
) -> Iterator[str]:
    """Load a model, and return an iterator over pieces of the text that continues a prompt.

    Args:
        path: the GGUF file.
        prompt: plain text; no chat template is applied.
        max_tokens: limit of generated tokens; the model may end the text earlier.
        temperature: of the sampling; 0 always takes the most likely token.
        seed: of the sampling.
        threads: number of CPU threads; None takes all CPUs that this process may use.

    Raises:
        D2QError: the runtime is not installed, the file can't be loaded, or the prompt is empty, not UTF-8, or longer
            than the context.
    """
    try:
        length = len(prompt.encode())
    except UnicodeEncodeError as error:
        raise D2QError("the prompt isn't valid UTF-8; give it in that encoding") from error
    # A token is at least a byte long. The model's own context can need a KV cache that doesn't fit in memory.
    model = load(path, length + max_tokens + SPARE_TOKENS, seed, threads)
    return _pieces(model, prompt, max_tokens, temperature)


def _pieces(model: Any, prompt: str, max_tokens: int, temperature: float) -> Iterator[str]:
    with closing(model):
        try:
            for piece in model(prompt, max_tokens=max_tokens, temperature=temperature, stream=True):
                yield piece["choices"][0]["text"]
        except ValueError as error:
            raise D2QError(f"llama.cpp can't continue the prompt: {error}") from error
        except AssertionError as error:  # llama-cpp-python asserts that there is a token to begin with
            reason = "the prompt is empty, and the model has no token that begins a text; give some text"
            raise D2QError(reason) from error
