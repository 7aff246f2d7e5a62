"""Text from a GGUF file, through the patched llama-cpp-python's high-level interface."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from d2q_edge import runtime
from d2q_edge.errors import D2QError
from d2q_edge.llama_model import usable_cpus


def generate(path: Path, prompt: str, max_tokens: int, temperature: float, seed: int) -> Iterator[str]:
    """Continue a prompt; yields pieces of text as they come.

    Args:
        path: the GGUF file.
        prompt: plain text; no chat template is applied.
        max_tokens: to generate at most.
        temperature: 0 takes the likeliest token every time.
        seed: of the sampling.

    Raises:
        D2QError: the runtime is not installed, or the file can't be loaded.
    """
    api: Any = runtime.require()
    if not path.is_file():
        raise D2QError(f"there is no file {path}")
    try:
        # n_ctx=0: the model's own context length.
        model = api.Llama(str(path), n_ctx=0, n_threads=usable_cpus(), seed=seed, verbose=False)
    except ValueError as error:
        raise D2QError(f"llama.cpp can't load {path}: {error}") from error
    with closing(model):
        for piece in model(prompt, max_tokens=max_tokens, temperature=temperature, stream=True):
            yield piece["choices"][0]["text"]
