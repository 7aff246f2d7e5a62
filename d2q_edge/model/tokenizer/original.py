"""Load the original tokenizer of a model in transformers."""

import json
from pathlib import Path
from typing import Any

import transformers

from d2q_edge.errors import D2QError

_ADVICE = "add the model's tokenizer.json, or correct the tokenizer_class in tokenizer_config.json"


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
        hint = ""
        if (directory / "tokenizer.model").is_file() and not fast:
            hint = "; with a tokenizer.model alone it needs more: pip install 'd2q-edge[sentencepiece]'"
        elif not fast:
            hint = f"; {_ADVICE}"
        reason = " ".join(str(error).split())
        raise D2QError(f"transformers can't load the tokenizer of {directory} ({reason}){hint}") from error


def assemble(directory: Path) -> dict[str, Any]:
    """Return the tokenizer.json of a model that has vocab.json and merges.txt in its place, as transformers makes it.

    The rest of it, such as the pre-tokenizer, comes with the class that tokenizer_config.json or config.json names.

    Raises:
        D2QError: transformers can't load it, or the class isn't one of a byte-level tokenizer.
    """
    tokenizer = load_original(directory)
    backend = getattr(tokenizer, "backend_tokenizer", None)  # some classes are written in Python only
    content: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {"model": {}}
    # A class of another kind, such as LlamaTokenizer, doesn't read the files at all.
    if content["model"].get("byte_fallback") is not False:
        raise D2QError(
            f"{directory} has vocab.json and merges.txt, of which transformers' {type(tokenizer).__name__} makes no "
            f"byte-level tokenizer; {_ADVICE}"
        )
    return content
