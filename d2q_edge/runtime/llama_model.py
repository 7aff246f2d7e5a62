"""One GGUF file loaded in the patched llama-cpp-python: tokens in, logits out.

Knows llama_cpp's low-level calls beyond those of llama_file.py. Does not know what is measured with
them (evaluation.py).
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from d2q_edge.errors import D2QError
from d2q_edge.runtime.llama_file import LlamaFile
from d2q_edge.utils.machine import usable_cpus


class LlamaModel(LlamaFile):
    """A loaded model with a context for one sequence. Use in a with block, or call close()."""

    def __init__(self, path: Path, context: int, threads: int | None = None) -> None:
        """Load a file.

        Args:
            path: the GGUF file.
            context: tokens per sequence.
            threads: of the CPU; None takes all that this process may use.

        Raises:
            D2QError: the runtime is not installed, there is no such file, or llama.cpp refuses it.
        """
        self._context: Any = None
        super().__init__(path)
        api, log = self._api, self._log
        parameters = api.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = context
        parameters.n_threads = parameters.n_threads_batch = threads or usable_cpus()
        self._context = api.llama_init_from_model(self._model, parameters)
        if not self._context:
            self.close()
            raise D2QError(f"llama.cpp can't make a context of {context} tokens for {path}: {log.cause}")
        self.vocab_size: int = api.llama_vocab_n_tokens(self._vocab)
        """Number of tokens."""
        self.bos: int | None = api.llama_vocab_bos(self._vocab) if api.llama_vocab_get_add_bos(self._vocab) else None
        """The token that the model wants first, if any."""

    def close(self) -> None:
        """Free the model."""
        if self._context:
            self._api.llama_free(self._context)
        self._context = None
        super().close()

    def tokenize(self, text: str) -> npt.NDArray[np.int32]:
        """Token ids, int32 [tokens]; special tokens are added as the model wants, but not read from `text`."""
        return np.array(self.ids(text, add_special=True, read_special=False), dtype=np.int32)

    def logits(self, tokens: npt.NDArray[np.int32], first: int) -> npt.NDArray[np.float32]:
        """Logits after each of the tokens first, first + 1, ... of one sequence.

        Args:
            tokens: int32, at most a context of them.
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
