"""Find and read the files of a PEFT adapter: adapter_config.json and adapter_model.safetensors."""

import hashlib
import shlex
from pathlib import Path
from typing import Any

from d2q_edge.errors import D2QError
from d2q_edge.model.hub import fetch_adapter, is_id
from d2q_edge.model.weight_files import ADAPTER_FILES, INDEX_FILE, PICKLES, SINGLE_FILE
from d2q_edge.utils.json_files import read_json_object

CONFIG, WEIGHTS = ADAPTER_FILES
_CHUNK = 2**20


def refuse_adapter(directory: Path) -> None:
    """Raise D2QError if a directory that was given as a model holds only an adapter of one."""
    if not (directory / CONFIG).is_file() or any((directory / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        return
    base = base_model(read_json_object(directory / CONFIG))
    raise D2QError(
        f"{directory} is a PEFT adapter of {base or 'another model'}, not a model; run d2q-edge convert "
        f"{shlex.quote(base) if base else 'BASE'} --adapter {shlex.quote(str(directory))}"
    )


def base_model(config: dict[str, Any]) -> str | None:
    """Return the name or path of the model that an adapter was trained on, if its config has it."""
    base = config.get("base_model_name_or_path")
    return base if isinstance(base, str) and base else None


def locate_adapter(adapter: str) -> Path:
    """Return the directory of an adapter; one given by its Hugging Face id is fetched into the hub's cache.

    Raises:
        D2QError: it can't be fetched, or isn't an adapter.
    """
    return fetch_adapter(adapter) if is_id(adapter) else Path(adapter).expanduser()


def adapter_files(adapter: str) -> list[Path]:
    """Return the two files of an adapter, given as for `locate_adapter`.

    Raises:
        D2QError: it can't be fetched, one is missing, or the weights are a pickle.
    """
    directory = locate_adapter(adapter)
    if not directory.is_dir():
        raise D2QError(
            f"there is no directory {directory}; give one that holds {CONFIG} and {WEIGHTS}, or an adapter's Hugging "
            "Face id"
        )
    if not (directory / CONFIG).is_file():
        raise D2QError(f"{directory} has no {CONFIG}, so it isn't a PEFT adapter")
    if (directory / WEIGHTS).is_file():
        return [directory / CONFIG, directory / WEIGHTS]
    if any(file.suffix in PICKLES for file in directory.glob("adapter_model.*")):
        raise D2QError(
            f"{directory} holds its weights as a PyTorch pickle file only, which can run any code when it is loaded; "
            "save the adapter again with a recent version of peft, which writes safetensors"
        )
    raise D2QError(f"{directory} has no {WEIGHTS}; complete the download")


def content_hash(files: list[Path]) -> str:
    """Return a SHA-256 of the content of some files, in hexadecimal."""
    digest = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as stream:
                while chunk := stream.read(_CHUNK):
                    digest.update(chunk)
        except OSError as error:
            raise D2QError(f"can't read {file}: {error.strerror or error}") from error
    return digest.hexdigest()
