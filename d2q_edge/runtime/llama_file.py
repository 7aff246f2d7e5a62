"""A GGUF file loaded with the patched llama-cpp-python's low-level API: loading, and the vocabulary."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any, TypeVar

from d2q_edge import runtime
from d2q_edge.errors import D2QError

_LOG_ERROR, _LOG_CONTINUE = 4, 5
_REASON = "error loading model: "
"""What llama.cpp prints before the reason; messages that say only that it failed come later."""

Loaded = TypeVar("Loaded", bound="LlamaFile")


class LlamaFile:
    """A loaded GGUF file. Use it in a with block, or call close()."""

    def __init__(self, path: Path, *, vocab_only: bool = False) -> None:
        """Load a file.

        Args:
            path: the GGUF file.
            vocab_only: don't load the weights.

        Raises:
            D2QError: the runtime is not installed, there is no such file, or llama.cpp refuses it.
        """
        self._api: Any = runtime.require()
        self._model: Any = None
        if not path.is_file():
            raise D2QError(f"there is no file {path}")
        self._log = Log(self._api)
        self._api.llama_backend_init()
        parameters = self._api.llama_model_default_params()
        parameters.vocab_only = vocab_only
        self._model = self._api.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self._model:
            raise D2QError(f"llama.cpp can't load {path}: {self._log.cause}")
        self._vocab = self._api.llama_model_get_vocab(self._model)

    def __enter__(self: Loaded) -> Loaded:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model."""
        if self._model:
            self._api.llama_model_free(self._model)
        self._model = None

    def ids(self, text: str, *, add_special: bool, read_special: bool) -> list[int]:
        """Tokenize a text.

        Args:
            text: without surrogates.
            add_special: add the special tokens (BOS, EOS) that the file asks for.
            read_special: parse the names of special tokens in the text.

        Raises:
            D2QError: llama.cpp fails.
        """
        raw = text.encode()
        room = len(raw) + 2
        found = (self._api.llama_token * room)()
        count = self._api.llama_tokenize(self._vocab, raw, len(raw), found, room, add_special, read_special)
        if count < 0:
            raise D2QError("llama.cpp can't tokenize the text")
        return list(found[:count])


class LlamaVocabulary(LlamaFile):
    """The vocabulary of a GGUF file, without the weights."""

    def __init__(self, path: Path) -> None:
        """Load a file's vocabulary.

        Raises:
            D2QError: see LlamaFile.
        """
        super().__init__(path, vocab_only=True)

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Tokenize a text; `special` both adds special tokens and parses their names in the text.

        Raises:
            D2QError: llama.cpp fails.
        """
        return self.ids(text, add_special=special, read_special=special)


class Log:
    """Collect the errors in llama.cpp's log, and keep the log off the terminal."""

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
