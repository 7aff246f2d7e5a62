"""Text from a GGUF file, through the patched llama-cpp-python's high-level interface."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from d2q_edge import runtime
from d2q_edge.errors import D2QError
from d2q_edge.gguf_reader import GGUFFile
from d2q_edge.runtime.machine import usable_cpus

SPARE_TOKENS = 8
"""Room for the special tokens around a prompt."""


def generate(path: Path, prompt: str, max_tokens: int, temperature: float, seed: int) -> Iterator[str]:
    """Continue a prompt. The model is loaded at once; the iterator yields pieces of text as they come.

    Args:
        path: the GGUF file.
        prompt: plain text; no chat template is applied.
        max_tokens: to generate at most.
        temperature: 0 takes the likeliest token every time.
        seed: of the sampling.

    Raises:
        D2QError: the runtime is not installed, the file can't be loaded, or the prompt is longer than its context.
    """
    api: Any = runtime.require()
    file = GGUFFile(path)
    file.check_blocks()
    longest = file.kv.get(f"{file.kv.get('general.architecture')}.context_length")
    # No token is shorter than a byte. The model's own context can be so long that its cache doesn't fit in memory.
    room = len(prompt.encode()) + max_tokens + SPARE_TOKENS
    if type(longest) is int and longest > 0:
        room = min(room, longest)
    try:
        model = api.Llama(
            str(path),
            n_ctx=room,
            n_threads=usable_cpus(),
            seed=seed,
            verbose=False,
        )
    except ValueError as error:
        raise D2QError(f"llama.cpp can't load {path}: {error}") from error
    return _pieces(model, prompt, max_tokens, temperature)


def _pieces(model: Any, prompt: str, max_tokens: int, temperature: float) -> Iterator[str]:
    with closing(model):
        try:
            for piece in model(prompt, max_tokens=max_tokens, temperature=temperature, stream=True):
                yield piece["choices"][0]["text"]
        except ValueError as error:
            raise D2QError(f"llama.cpp can't continue the prompt: {error}") from error
