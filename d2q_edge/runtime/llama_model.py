"""Load a GGUF file with the patched llama-cpp-python's low-level API: its vocabulary, or a model that gives logits."""

import ctypes
import os
import sys
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from d2q_edge import runtime
from d2q_edge.calibration.chat_template import ChatTemplate
from d2q_edge.errors import D2QError
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.options import LOADING, LoadOptions
from d2q_edge.runtime.adapters import Adapter, parse_adapters
from d2q_edge.utils.machine import usable_cpus

_LOG_ERROR, _LOG_CONTINUE = 4, 5
_REASONS = "error loading model: ", "failed to apply lora adapter: "
"""What llama.cpp prints before a reason; messages that say only that it failed come later."""

Loaded = TypeVar("Loaded", bound="LlamaVocabulary")


class LlamaVocabulary:
    """The vocabulary of a GGUF file. Use it in a with block, or call close()."""

    vocab_only = True

    def __init__(self, path: Path, *, repack: bool = True) -> None:
        """Load a GGUF file; `repack` lets llama.cpp rearrange weights in memory.

        Raises:
            D2QError: the runtime is not installed, there is no such file, or llama.cpp refuses it.
        """
        self._api: Any = runtime.require()
        if not path.is_file():
            raise D2QError(f"there is no file {path}")
        self._log = Log(self._api)
        self._api.llama_backend_init()
        parameters = self._api.llama_model_default_params()
        parameters.vocab_only = self.vocab_only
        parameters.use_extra_bufts = repack
        self._model: Any = self._api.llama_model_load_from_file(os.fsencode(path), parameters)
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

    def tokenize(self, text: str, *, add_special: bool = True, read_special: bool = False) -> list[int]:
        """Return the token ids of a text without surrogates.

        Args:
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

    @property
    def chat_template(self) -> ChatTemplate:
        """Return the file's chat template; one for the plain form if it has none."""
        source = self._api.llama_model_chat_template(self._model, None)
        roles = {"bos_token": self._api.llama_vocab_bos, "eos_token": self._api.llama_vocab_eos}
        ids = {role: find(self._vocab) for role, find in roles.items()}
        texts = {role: self._api.llama_vocab_get_text(self._vocab, index) for role, index in ids.items() if index >= 0}
        return ChatTemplate(source and source.decode(), {role: text.decode() for role, text in texts.items()})


class LlamaModel(LlamaVocabulary):
    """A loaded model with a context for one sequence.

    Attributes:
        vocab_size: number of tokens.
        bos: the token that the model wants first, or None.
    """

    vocab_only = False

    def __init__(self, path: Path, context: int, threads: int | None = None, options: LoadOptions = LOADING) -> None:
        """Load a GGUF file.

        Args:
            path: the file.
            context: n_ctx, tokens per sequence.
            threads: number of CPU threads; None takes all CPUs that this process may use.
            options: adapters, types of the KV cache, repacking.

        Raises:
            D2QError: see LlamaVocabulary; an adapter can't be read, or is for another model.
        """
        adapters = parse_adapters(options.lora)
        super().__init__(path, repack=options.repack)
        api = self._api
        parameters = api.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = context
        parameters.n_threads = parameters.n_threads_batch = threads or usable_cpus()
        parameters.type_k, parameters.type_v = (
            getattr(api, f"GGML_TYPE_{kind.upper()}") for kind in (options.cache_type_k, options.cache_type_v)
        )
        self._context: Any = api.llama_init_from_model(self._model, parameters)
        if not self._context:
            self.close()
            raise D2QError(f"llama.cpp can't make a context of {context} tokens for {path}: {self._log.cause}")
        self._add(adapters, path)
        self.vocab_size: int = api.llama_vocab_n_tokens(self._vocab)
        self.bos: int | None = api.llama_vocab_bos(self._vocab) if api.llama_vocab_get_add_bos(self._vocab) else None

    def close(self) -> None:
        """Free the context and the model."""
        if self._context:
            self._api.llama_free(self._context)
        self._context = None
        super().close()

    def _add(self, adapters: tuple[Adapter, ...], path: Path) -> None:
        """Load adapters, which are freed with the model, and use them all in the context."""
        api, file = self._api, GGUFFile(path) if adapters else None
        for adapter in adapters:
            if file is not None and (note := adapter.misfit(file)) is not None:
                print(note, file=sys.stderr)
        handles = (api.llama_adapter_lora_p_ctypes * len(adapters))()
        for index, adapter in enumerate(adapters):
            handles[index] = api.llama_adapter_lora_init(self._model, os.fsencode(adapter.path))
            if not handles[index]:
                self.close()
                raise D2QError(f"llama.cpp can't use the adapter {adapter.path} with {path}: {self._log.cause}")
        scales = (ctypes.c_float * len(adapters))(*(adapter.scale for adapter in adapters))
        if adapters and api.llama_set_adapters_lora(self._context, handles, len(adapters), scales):
            self.close()
            raise D2QError(f"llama.cpp can't use the adapters with {path}: {self._log.cause}")

    def logits(self, tokens: npt.NDArray[np.int32], first: int) -> npt.NDArray[np.float32]:
        """Run one sequence of at most n_ctx tokens, int32, and return the logits at the positions from `first` on.

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
        reasons = [error.partition(mark)[2] for mark in _REASONS for error in self._errors if mark in error]
        return [*reasons, *self._errors[-1:], "no reason given"][0]
