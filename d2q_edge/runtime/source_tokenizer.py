"""Tokenize as the model that is converted does: with transformers, or a GGUF file's own tokenizer with llama.cpp."""

import weakref
from typing import Any

from d2q_edge import runtime
from d2q_edge.errors import D2QError
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.tokenizer.original import load_original
from d2q_edge.runtime.llama_model import LlamaVocabulary
from d2q_edge.runtime.trial_load import why_not


def source_tokenizer(checkpoint: Checkpoint) -> Any:
    """Return a checkpoint's tokenizer in transformers, or a FileTokenizer; raise D2QError if it can't be loaded."""
    return FileTokenizer(checkpoint.gguf) if checkpoint.gguf is not None else load_original(checkpoint.directory)


class FileTokenizer:
    """A GGUF file's tokenizer in llama.cpp, to be called like one of transformers."""

    def __init__(self, file: GGUFFile) -> None:
        """Load the vocabulary; raise D2QError if the runtime isn't installed or llama.cpp can't load the file."""
        try:
            runtime.require()
        except D2QError as error:
            raise D2QError(f"only llama.cpp has the tokenizer of {file.path}, but {error}") from error
        # First in another process: llama.cpp aborts on some malformed files.
        if (reason := why_not(file.path)) is not None:
            raise D2QError(f"llama.cpp can't load {file.path}: {reason}")
        self._vocabulary = LlamaVocabulary(file.path)
        weakref.finalize(self, self._vocabulary.close)

    def __call__(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        """Return {"input_ids": token ids}; the names of special tokens in the text become these tokens."""
        ids = self._vocabulary.tokenize(text, add_special=add_special_tokens, read_special=True)
        return {"input_ids": ids}
