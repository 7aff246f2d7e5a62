"""The vocabulary of a GGUF file as the patched llama-cpp-python tokenizes with it; no weights are loaded.

Knows llama_cpp's low-level calls, as llama_model.py does. Does not know what the tokens are compared with (verify.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from d2q_edge import runtime
from d2q_edge.errors import D2QError
from d2q_edge.llama_model import Log


class LlamaVocabulary:
    """A loaded vocabulary. Use in a with block, or call close()."""

    def __init__(self, path: Path) -> None:
        """Load it.

        Raises:
            D2QError: the runtime is not installed, or llama.cpp refuses the file.
        """
        self._api: Any = runtime.require()
        api = self._api
        log = Log(api)
        api.llama_backend_init()
        parameters = api.llama_model_default_params()
        parameters.vocab_only = True
        self._model: Any = api.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise D2QError(f"llama.cpp can't load {path}: {log.cause}")
        self._vocab = api.llama_model_get_vocab(self._model)

    def __enter__(self) -> LlamaVocabulary:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free it."""
        if self._model:
            self._api.llama_model_free(self._model)
        self._model = None

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text.

        Args:
            text: what to tokenize; without surrogates.
            special: add the special tokens that the file says, and find special tokens in the text.

        Raises:
            D2QError: llama.cpp fails.
        """
        raw = text.encode()
        room = len(raw) + 2
        ids = (self._api.llama_token * room)()
        count = self._api.llama_tokenize(self._vocab, raw, len(raw), ids, room, special, special)
        if count < 0:
            raise D2QError("llama.cpp can't tokenize the text")
        return list(ids[:count])
