"""A GGUF file as a language model, with the patched llama-cpp-python's low-level API: tokens in, logits out."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from d2q_edge.errors import D2QError
from d2q_edge.runtime.llama_file import LlamaFile
from d2q_edge.utils.machine import usable_cpus


class LlamaModel(LlamaFile):
    """A loaded model with a context for one sequence.

    Attributes:
        vocab_size: number of tokens.
        bos: the token that the model wants first, or None.
    """

    def __init__(self, path: Path, context: int, threads: int | None = None) -> None:
        """Load a file.

        Args:
            path: the GGUF file.
            context: n_ctx, tokens per sequence.
            threads: number of CPU threads; None takes all CPUs that this process may use.

        Raises:
            D2QError: the runtime is not installed, there is no such file, or llama.cpp refuses it.
        """
        self._context: Any = None
        super().__init__(path)
        api = self._api
        parameters = api.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = context
        parameters.n_threads = parameters.n_threads_batch = threads or usable_cpus()
        self._context = api.llama_init_from_model(self._model, parameters)
        if not self._context:
            self.close()
            raise D2QError(f"llama.cpp can't make a context of {context} tokens for {path}: {self._log.cause}")
        self.vocab_size: int = api.llama_vocab_n_tokens(self._vocab)
        self.bos: int | None = api.llama_vocab_bos(self._vocab) if api.llama_vocab_get_add_bos(self._vocab) else None

    def close(self) -> None:
        """Free the context and the model."""
        if self._context:
            self._api.llama_free(self._context)
        self._context = None
        super().close()

    def tokenize(self, text: str) -> npt.NDArray[np.int32]:
        """Return token ids, int32 [tokens]: special tokens added as the model wants, but not parsed in the text."""
        return np.array(self.ids(text, add_special=True, read_special=False), dtype=np.int32)

    def logits(self, tokens: npt.NDArray[np.int32], first: int) -> npt.NDArray[np.float32]:
        """Run one sequence, and return the logits at the positions from `first` on.

        Args:
            tokens: int32, at most n_ctx of them.
            first: positions before it are not returned.

        Returns:
            float32 [len(tokens) - first, vocab_size]; valid until the next call.

        Raises:
            D2QError: llama.cpp fails.
        """
        api = self._api
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        batch = api.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for position, token in enumerate(tokens.tolist()):
                batch.token[position] = token
                batch.pos[position] = position
                batch.n_seq_id[position] = 1
                batch.seq_id[position][0] = 0
                batch.logits[position] = position >= first
            if api.llama_decode(self._context, batch):
                raise D2QError("llama.cpp failed to evaluate the text")
            values = api.llama_get_logits(self._context)
            return np.ctypeslib.as_array(values, shape=(len(tokens) - first, self.vocab_size))
        finally:
            api.llama_batch_free(batch)
