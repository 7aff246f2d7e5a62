"""One GGUF file loaded in the patched llama-cpp-python: tokens in, logits out.

Knows llama_cpp's low-level calls. Does not know what is measured with them (evaluation.py). llama.cpp's log is kept off
the terminal; its errors become the message when a file can't be loaded.
"""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from d2q_edge import runtime
from d2q_edge.errors import D2QError
from d2q_edge.runtime.machine import usable_cpus

_LOG_ERROR, _LOG_CONTINUE = 4, 5
_REASON = "error loading model: "
"""What llama.cpp writes before the reason; a message that says only that it failed comes last."""


class LlamaModel:
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
        self._api: Any = runtime.require()
        self._model: Any = None
        self._context: Any = None
        if not path.is_file():
            raise D2QError(f"there is no file {path}")
        api = self._api
        log = Log(api)
        api.llama_backend_init()
        self._model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        if not self._model:
            raise D2QError(f"llama.cpp can't load {path}: {log.cause}")
        parameters = api.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = context
        parameters.n_threads = parameters.n_threads_batch = threads or usable_cpus()
        self._context = api.llama_init_from_model(self._model, parameters)
        if not self._context:
            self.close()
            raise D2QError(f"llama.cpp can't make a context of {context} tokens for {path}: {log.cause}")
        self._vocab = api.llama_model_get_vocab(self._model)
        self.vocab_size: int = api.llama_vocab_n_tokens(self._vocab)
        """Number of tokens."""
        self.bos: int | None = api.llama_vocab_bos(self._vocab) if api.llama_vocab_get_add_bos(self._vocab) else None
        """The token that the model wants first, if any."""

    def __enter__(self) -> "LlamaModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model."""
        if self._context:
            self._api.llama_free(self._context)
        if self._model:
            self._api.llama_model_free(self._model)
        self._context = self._model = None

    def tokenize(self, text: str) -> npt.NDArray[np.int32]:
        """Token ids, int32 [tokens]; special tokens are added as the model wants, but not read from `text`."""
        raw = text.encode()
        room = len(raw) + 2
        ids = (self._api.llama_token * room)()
        count = self._api.llama_tokenize(self._vocab, raw, len(raw), ids, room, True, False)
        if count < 0:
            raise D2QError("llama.cpp can't tokenize the text")
        return np.ctypeslib.as_array(ids)[:count].copy()

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


class Log:
    """Takes llama.cpp's log messages and remembers the errors."""

    _active: Any = None

    def __init__(self, api: Any) -> None:
        self._errors: list[str] = []
        self._level = 0

        def receive(level: int, text: bytes, _: ctypes.c_void_p) -> None:
            self._level = level if level != _LOG_CONTINUE else self._level
            if self._level == _LOG_ERROR and text.strip():
                self._errors.append(text.decode(errors="replace").strip())

        # llama.cpp keeps the pointer: the callback must outlive this object.
        Log._active = api.llama_log_callback(receive)
        api.llama_log_set(Log._active, ctypes.c_void_p(0))

    @property
    def cause(self) -> str:
        """Why the last call failed."""
        reasons = [error.partition(_REASON)[2] for error in self._errors if _REASON in error]
        return [*reasons, *self._errors[-1:], "no reason given"][0]
