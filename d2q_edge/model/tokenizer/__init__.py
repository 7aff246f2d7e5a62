"""Read the tokenizer of a Hugging Face model as GGUF needs it; export/tokenizer_check.py checks the result."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2q_edge.errors import D2QError
from d2q_edge.model.tokenizer import bpe, gemma4, sentencepiece
from d2q_edge.model.tokenizer.content import Tokenizer
from d2q_edge.model.tokenizer.files import Files
from d2q_edge.model.tokenizer.from_gguf import tokenizer_of

__all__ = ["Tokenizer", "read_tokenizer", "tokenizer_of"]


def read_tokenizer(
    directory: Path, config: Mapping[str, Any], vocab_size: int, pre_tokenizer: str | None = None
) -> Tokenizer:
    """Read the tokenizer files and chat templates of a model directory.

    tokenizer.json decides, as in transformers. A tokenizer.model beside it supplies the scores of a SentencePiece
    tokenizer and is ignored if tokenizer.json is byte-level.

    Args:
        directory: the model's.
        config: config.json's content; its `ROLE_token_id` entries are the last resort for special ids.
        vocab_size: rows of the embedding matrix; ids beyond the tokenizer's become unused "[PADi]" tokens.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer; None detects it.

    Raises:
        D2QError: files are missing, unreadable or contradictory, or llama.cpp has no equivalent tokenizer.
    """
    files = Files(directory, config, vocab_size)
    try:
        # A tokenizer.json with byte fallback holds a converted SentencePiece model.
        model = files.content["model"] if files.content else {"type": "BPE", "byte_fallback": True}
        if model.get("type") != "BPE":
            raise D2QError(f"{files.json} holds a {model.get('type')} tokenizer; only BPE is supported")
        if not model.get("byte_fallback"):
            return bpe.build(files, pre_tokenizer)
        if pre_tokenizer is not None:
            raise D2QError(f"--pre-tokenizer is for byte-level BPE; {directory} has a SentencePiece tokenizer")
        if config.get("model_type") == gemma4.MODEL_TYPE:
            return gemma4.build(files)
        return sentencepiece.build(files)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise D2QError(f"{files.json} doesn't have the structure of a tokenizer ({error!r})") from error
