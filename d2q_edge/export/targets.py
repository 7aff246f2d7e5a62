"""Check that a conversion doesn't overwrite what it reads, or write one file twice, whatever --force allows."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from d2q_edge.errors import D2QError
from d2q_edge.model.links import READ_SUFFIXES


def check_targets(targets: Mapping[str, Path], model: Path, texts: Iterable[Path] = ()) -> None:
    """Compare the files to be written, by what they are ("the output"), with each other and with what is read.

    That is `texts`, and the GGUF file `model`, or the checkpoint in this directory, to which GGUF files don't belong.

    Raises:
        D2QError: two targets are the same file, or one is read.
    """
    seen: dict[Path, str] = {}
    for name, path in targets.items():
        if (other := seen.setdefault(path.resolve(), name)) != name:
            raise D2QError(f"{other} and {name} are the same file, {path}; give them different names")
    files = model.iterdir() if model.is_dir() else ()
    inputs = {file.resolve(): "the model" for file in files if file.suffix in READ_SUFFIXES}
    inputs |= {model.resolve(): "the model"} if model.is_file() else {}
    inputs |= {text.resolve(): "what is read" for text in texts}
    for path, name in seen.items():
        if path in inputs:
            raise D2QError(f"{name}, {path}, belongs to {inputs[path]} and won't be replaced; choose another name")
