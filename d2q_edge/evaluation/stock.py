"""Stock files to compare with: llama.cpp's own types, made by its own tools with an importance matrix.

Knows llama-imatrix and llama-quantize. The importance matrix, which takes longest and is small, is kept in the cache
for the next time; the files are as large as models, and whoever asks for them says where they go. Both have names that
say what they were made from.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from d2q_edge.calibration.text import BUILTIN, Text, load_text
from d2q_edge.errors import D2QError
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.runtime import follow_tool, source
from d2q_edge.runtime.llama_vocabulary import LlamaVocabulary
from d2q_edge.utils.files import scratch_directory
from d2q_edge.utils.machine import usable_cpus

IMATRIX_CONTEXT = 512
"""Tokens per chunk of the importance matrix; llama-imatrix's default."""
PURE = ("--pure", "--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0")
TYPES = (
    "Q2_K", "Q2_K_S", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_0", "Q4_1", "Q4_K_S", "Q4_K_M", "Q5_0", "Q5_1", "Q5_K_S",
    "Q5_K_M", "Q6_K", "Q8_0", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_S",
    "IQ3_M", "IQ4_NL", "IQ4_XS", "Q3_K", "Q4_K", "Q5_K",
)  # fmt: skip
"""What llama-quantize calls the mixtures that work for every model."""
UNFINISHED = ".d2q-edge-unfinished-"
"""Beginning of the name of directories beside a stock file, in which it is made."""
ELSEWHERE = "choose another directory for the stock files"
"""What people can do about a directory."""


def parse_types(names: str) -> tuple[str, ...]:
    """Names of stock types from a list separated by commas, each once, in capitals.

    Raises:
        D2QError: llama-quantize has no such type.
    """
    types = tuple(dict.fromkeys(name.strip().upper() for name in names.split(",") if name.strip()))
    if unknown := [name for name in types if name not in TYPES]:
        raise D2QError(f"{unknown[0]} isn't a stock type that can be made; there are {', '.join(TYPES)}")
    return types


def stock_files(
    original: Path, types: Sequence[str], directory: Path, calibration: str = "builtin", *, pure: bool = False
) -> dict[str, Path]:
    """Stock files in a directory, by type: those that are there from an earlier time are taken, the others are made.

    A file's name has a hash of what it was made from: the original's path, size and time of its last change, the
    calibration text, the type, and `pure`. So files of other originals and texts can lie beside it.

    Args:
        original: the GGUF file to quantize, of f16, bf16 or f32.
        types: some of TYPES.
        directory: where they are; made if it isn't there.
        calibration, pure: see make_stock_file.

    Raises:
        D2QError: see make_stock_file; or nothing can be written to the directory, or what has a stock file's name there
            isn't one.
    """
    text = load_text(calibration, "calibration")
    targets = {kind: directory / _stock_name(original, text, kind, pure) for kind in types}
    missing = [kind for kind, target in targets.items() if not _is_there(target)]
    if missing:
        # Better now than after the importance matrix.
        with scratch_directory(directory, UNFINISHED, ELSEWHERE):
            pass
    for kind, target in targets.items():
        if kind in missing:
            make_stock_file(original, kind, target, calibration, pure=pure)
        else:
            print(f"{target} is there already", file=sys.stderr)
    return targets


def make_stock_file(
    original: Path, type_name: str, target: Path, calibration: str = "builtin", *, pure: bool = False
) -> None:
    """Quantize with llama-quantize.

    Args:
        original: the GGUF file to quantize, of f16, bf16 or f32.
        type_name: one of TYPES.
        target: the file to write; replaced if it is there.
        calibration: a text file, or "builtin", for the importance matrix.
        pure: every matrix of the blocks in the named type, embeddings and head in q8_0; otherwise llama-quantize's
            mixture of that name, which is what people publish.

    Raises:
        D2QError: the tools aren't built, or fail, or the text can't be read.
    """
    matrix = importance_matrix(original, calibration)
    with scratch_directory(target.parent, UNFINISHED, ELSEWHERE) as work:
        made = work / target.name
        follow_tool(
            "llama-quantize", *(PURE if pure else ()), "--imatrix", matrix, original, made, type_name, usable_cpus(),
            what=f"Making {type_name}", unit="tensor",
        )  # fmt: skip
        try:
            made.replace(target)
        except OSError as error:
            raise D2QError(f"can't write {target}: {error.strerror or error}") from error


def importance_matrix(original: Path, calibration: str = "builtin") -> Path:
    """The importance matrix of a file for a text, from the cache or made now by llama-imatrix.

    Raises:
        D2QError: the tool isn't built, or fails, or the text can't be read or is too short.
    """
    text = load_text(calibration, "calibration")
    place = _cached(original, text)
    if place.is_file():
        return place
    _check_length(original, text)
    path = BUILTIN["calibration"] if calibration == "builtin" else Path(calibration)
    with scratch_directory(place.parent, "partial-", "set XDG_CACHE_HOME") as work:
        made = work / place.name
        follow_tool(
            "llama-imatrix", "-m", original, "-f", path, "-o", made, "-c", IMATRIX_CONTEXT, "-t", usable_cpus(),
            what="Importance matrix", unit="chunk",
        )  # fmt: skip
        try:
            made.replace(place)
        except OSError as error:
            raise D2QError(f"can't write {place}: {error.strerror or error}; set XDG_CACHE_HOME") from error
    return place


def _check_length(original: Path, text: Text) -> None:
    """llama-imatrix refuses a text of less than two chunks, too, but what it says about it is sometimes lost."""
    with LlamaVocabulary(original) as vocabulary:
        count = len(vocabulary.tokenize(text.content, special=False))
    if count < 2 * IMATRIX_CONTEXT:
        raise D2QError(
            f"the calibration text has {count} tokens, but an importance matrix needs {2 * IMATRIX_CONTEXT}: "
            "choose a longer text"
        )


def _cached(original: Path, text: Text) -> Path:
    """Where the importance matrix is kept."""
    return source.cache_directory().parent / "imatrix" / f"{original.stem}-{_hash(original, text)}.gguf"


def _stock_name(original: Path, text: Text, type_name: str, pure: bool) -> str:
    """What a stock file is called."""
    kind = f"{type_name}{'-pure' if pure else ''}"
    return f"{original.stem}-{kind}-{_hash(original, text, kind)}.gguf"


def _hash(original: Path, text: Text, *others: str) -> str:
    """For a name: what something was made from."""
    try:
        status = original.stat()
    except OSError as error:
        raise D2QError(f"can't read {original}: {error.strerror or error}") from error
    made_from = [str(original.resolve()), status.st_size, status.st_mtime_ns, text.sha256, IMATRIX_CONTEXT, *others]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]


def _is_there(target: Path) -> bool:
    """Whether a stock file has been made earlier; what else has its name is left alone."""
    try:
        if not target.exists():
            return False
        GGUFFile(target)
    except OSError as error:
        raise D2QError(f"can't use {target} ({error.strerror or error}); {ELSEWHERE}") from error
    except D2QError as error:
        raise D2QError(
            f"{target} has a stock file's name but isn't one ({error}); remove it, or {ELSEWHERE}"
        ) from error
    return True
