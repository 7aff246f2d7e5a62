"""Make files in llama.cpp's own types with its own tools and an importance matrix, to compare with.

The importance matrix, which takes longest, is kept in the cache.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from d2q_edge.calibration.mixture import digest, load_parts
from d2q_edge.errors import D2QError
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.options import ComparisonOptions
from d2q_edge.runtime import source
from d2q_edge.runtime.llama_model import LlamaVocabulary
from d2q_edge.runtime.tools import INSTALLED, Tools
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
"""llama-quantize's mixtures that work for every model."""
UNFINISHED = ".d2q-edge-unfinished-"
"""Prefix of the directories, beside a stock file, in which it is made."""
REMEDY = "choose another directory for the stock files"


def parse_types(names: str) -> tuple[str, ...]:
    """Parse a comma-separated list of stock types: each once, in capitals.

    Raises:
        D2QError: llama-quantize has no such type.
    """
    types = tuple(dict.fromkeys(name.strip().upper() for name in names.split(",") if name.strip()))
    if unknown := [name for name in types if name not in TYPES]:
        raise D2QError(f"{unknown[0]} isn't a stock type that can be made; there are {', '.join(TYPES)}")
    return types


@dataclass(frozen=True)
class StockQuantizer:
    """Quantizes one original model with llama-quantize and an importance matrix.

    Attributes:
        original: the GGUF file to quantize, in F16, BF16 or F32.
        calibration: texts for the importance matrix, as in Options; it takes all of them, whatever their weights.
        pure: quantize every matrix of the blocks to the same type, embeddings and head to Q8_0; otherwise the mixtures
            of llama-quantize, which are what people publish.
        tools: where llama.cpp's tools are.
        threads: number of CPU threads; None takes all CPUs that this process may use.
    """

    original: Path
    calibration: str | tuple[str, ...] = ComparisonOptions.calibration
    pure: bool = False
    tools: Tools = INSTALLED
    threads: int | None = None

    def files(self, types: Sequence[str], directory: Path) -> dict[str, Path]:
        """Return stock files in a directory, by type; those of an earlier call are reused, the others are made.

        A file's name has a hash of the original's path, size and time of its last change, the calibration text, the
        type, and `pure`, so that files of other originals and texts can lie beside it.

        Raises:
            D2QError: see `quantize`; or the directory can't be written to, or another file has a stock file's name.
        """
        targets = {}
        for kind in types:
            label = f"{kind}{'-pure' if self.pure else ''}"
            targets[kind] = directory / f"{self.original.stem}-{label}-{self._hash(label)}.gguf"
        missing = [kind for kind, target in targets.items() if not _is_there(target)]
        if missing:
            with scratch_directory(directory, UNFINISHED, REMEDY):
                pass  # it can be written to, which is better known before the importance matrix is made
        for kind, target in targets.items():
            if kind in missing:
                self.quantize(kind, target)
            else:
                print(f"{target} is there already", file=sys.stderr)
        return targets

    def quantize(self, type_name: str, target: Path) -> None:
        """Write a file of one of TYPES; a target that exists is replaced.

        Raises:
            D2QError: the tools aren't built, or fail, or the text can't be read.
        """
        matrix = self.importance_matrix()
        with scratch_directory(target.parent, UNFINISHED, REMEDY) as work:
            made = work / target.name
            options = (*(PURE if self.pure else ()), "--imatrix", matrix)
            arguments = (*options, self.original, made, type_name, self.threads or usable_cpus())
            self.tools.follow("llama-quantize", *arguments, description=f"Making {type_name}", unit="tensor")
            _move(made, target)

    def importance_matrix(self) -> Path:
        """Return the importance matrix, from the cache or made now by llama-imatrix.

        Raises:
            D2QError: the tool isn't built, or fails, or the text can't be read or is too short.
        """
        target = source.cache_directory().parent / "imatrix" / f"{self.original.stem}-{self._hash()}.gguf"
        if target.is_file():
            return target
        texts = [part.text for part in load_parts(self.calibration)]
        with LlamaVocabulary(self.original) as vocabulary:
            template = vocabulary.chat_template
            content = "".join(text.render(template) for text in texts)
            # llama-imatrix checks the length, too, but its message can be lost.
            count = len(vocabulary.tokenize(content, add_special=False))
        if count < 2 * IMATRIX_CONTEXT:
            raise D2QError(
                f"the calibration text has {count} tokens, but an importance matrix needs {2 * IMATRIX_CONTEXT}: "
                "choose a longer text"
            )
        special = ("--parse-special",) if any(text.has_conversations for text in texts) else ()
        with scratch_directory(target.parent, "partial-", "set XDG_CACHE_HOME") as work:
            made, rendered = work / target.name, work / "calibration.txt"
            rendered.write_text(content, "utf-8")
            options = (*special, "-c", IMATRIX_CONTEXT, "-t", self.threads or usable_cpus())
            arguments = ("-m", self.original, "-f", rendered, "-o", made, *options)
            self.tools.follow("llama-imatrix", *arguments, description="Importance matrix", unit="chunk")
            _move(made, target)
        return target

    def _hash(self, *others: str) -> str:
        """Hash what a file is made from."""
        texts = digest(load_parts(self.calibration))
        try:
            status = self.original.stat()
        except OSError as error:
            raise D2QError(f"can't read {self.original}: {error.strerror or error}") from error
        original = (str(self.original.resolve()), status.st_size, status.st_mtime_ns)
        inputs = [*original, texts, IMATRIX_CONTEXT, *others]
        return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]


def _move(made: Path, target: Path) -> None:
    try:
        made.replace(target)
    except OSError as error:
        raise D2QError(f"can't write {target}: {error.strerror or error}") from error


def _is_there(target: Path) -> bool:
    """Whether a stock file was made earlier; any other file of its name is an error."""
    try:
        if not target.exists():
            return False
        GGUFFile(target)
    except OSError as error:
        raise D2QError(f"can't use {target} ({error.strerror or error}); {REMEDY}") from error
    except D2QError as error:
        raise D2QError(f"{target} has a stock file's name but isn't one ({error}); remove it, or {REMEDY}") from error
    return True
