"""Load the original tokenizer of a model in transformers."""

from pathlib import Path
from typing import Any

import transformers

from d2q_edge.errors import D2QError


def load_original(directory: Path) -> Any:
    """Return the tokenizer of a directory; raise D2QError if transformers can't load it.

    With a tokenizer.json, AutoTokenizer isn't used: for some classes that a model can name it keeps vocabulary and
    merges and makes up the rest (in 5.23 it forgets that SmolLM2 splits digits).
    """
    fast = (directory / "tokenizer.json").is_file()
    try:
        kind = transformers.PreTrainedTokenizerFast if fast else transformers.AutoTokenizer
        return kind.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # transformers raises all kinds of exceptions for damaged files.
        hint = "" if fast else "; with a tokenizer.model alone it needs more: pip install 'd2q-edge[sentencepiece]'"
        raise D2QError(f"transformers can't load the tokenizer of {directory} ({error}){hint}") from error
