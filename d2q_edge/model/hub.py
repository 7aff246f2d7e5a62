"""Fetch models by their Hugging Face id into the hub's cache.

huggingface_hub does the transfers; this module selects the files (never pickles), checks the disk space beforehand,
falls back to a complete cached copy when the hub can't be reached, and explains every failure in one sentence. The
access token comes from the environment variable HF_TOKEN only.
"""

import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils.tqdm import disable_progress_bars

from d2q_edge.errors import D2QError
from d2q_edge.model.weight_files import ADAPTER_FILES, INDEX_FILE, PICKLES, SINGLE_FILE, indexed_files

SMALL_FILES = (
    *("config.json", "generation_config.json", "README.md", "tokenizer.json", "tokenizer.model", "vocab.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.json"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja"),
)
"""What is fetched beside the weights, as far as the repository has it."""
# As huggingface_hub validates ids.
_ID = re.compile(r"(?!.*(--|\.\.))(?!.*\.git$)[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9]([\w.-]{0,94}\w)?", re.ASCII)
_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)", re.ASCII)


def locate(model: str | Path, revision: str | None = None) -> Path:
    """Return the directory of a model; one given by its Hugging Face id is fetched into the hub's cache.

    A directory wins over an id of the same spelling. The revision of an id is a branch, tag or commit; None is main.

    Raises:
        D2QError: the model can't be fetched, has no safetensors weights, or a revision is given for a directory.
    """
    if not is_id(model):
        if revision is not None:
            raise D2QError(f"{model} is not a Hugging Face id, so --revision has no meaning; leave it out")
        return Path(model).expanduser()
    return _Download(str(model), revision or constants.DEFAULT_REVISION).run()


def is_id(model: str | Path) -> bool:
    """Return whether this names a repository of the hub: a directory or file of the same spelling wins."""
    return _ID.fullmatch(str(model)) is not None and not Path(model).expanduser().exists()


def fetch_adapter(adapter: str) -> Path:
    """Fetch the files of a PEFT adapter by its id into the hub's cache, and return their directory.

    Raises:
        D2QError: they can't be fetched, or it isn't an adapter.
    """
    download = _Download(adapter, constants.DEFAULT_REVISION)
    with download._errors_explained("the adapter"):
        snapshot = huggingface_hub.snapshot_download(adapter, allow_patterns=[*ADAPTER_FILES], token=download.token)
    if not (Path(snapshot) / ADAPTER_FILES[0]).exists():
        raise D2QError(f"{adapter} has no {ADAPTER_FILES[0]}, so it isn't a PEFT adapter")
    return Path(snapshot)


def repository(directory: Path) -> str | None:
    """Return the id of the model in a directory of the hub's cache (models--ORG--NAME/snapshots/COMMIT), or None."""
    snapshots = directory.resolve().parent
    match = _SNAPSHOT.fullmatch(snapshots.parent.name)
    return f"{match[1]}/{match[2]}" if match and snapshots.name == "snapshots" else None


def blob_directories(directory: Path) -> tuple[Path, ...]:
    """Return where the symbolic links of a snapshot may lead: the blobs of its repository, and the shared ones."""
    storage = directory.resolve().parent.parent
    return () if repository(directory) is None else (storage / "blobs", storage.parent / "blobs")


class _Download:
    """The download of one revision of one model."""

    def __init__(self, model: str, revision: str) -> None:
        self.model, self.revision = model, revision
        if not sys.stderr.isatty():
            disable_progress_bars()
        # False, unlike None, also rules out the token that `hf auth login` has stored.
        self.token: str | bool = os.environ.get("HF_TOKEN") or False

    def run(self) -> Path:
        try:
            commit, sizes = self._list_files()
        except D2QError as error:
            return self._cached_copy(error)
        self._check_files(sizes)
        index = () if SINGLE_FILE in sizes else (INDEX_FILE,)
        with self._errors_explained("the settings and the tokenizer"):
            # By the name of the revision, for the cache to record which commit it stands for.
            snapshot = huggingface_hub.snapshot_download(
                self.model, revision=self.revision, allow_patterns=[*SMALL_FILES, *index], token=self.token
            )
        directory = Path(snapshot)
        if directory.name != commit:
            # The branch moved after its files were listed.
            return _Download(self.model, directory.name).run()
        weights = indexed_files(directory / INDEX_FILE) if index else [SINGLE_FILE]
        if absent := [name for name in weights if name not in sizes]:
            raise D2QError(f"{INDEX_FILE} of {self.model} names {absent[0]}, but the repository has no such file")
        self._check_space(sum(sizes[name] for name in weights if not (directory / name).exists()), directory)
        for name in weights:
            # In this thread: snapshot_download's go on after Ctrl-C until their files are complete.
            with self._errors_explained(name):
                huggingface_hub.hf_hub_download(self.model, name, revision=commit, token=self.token)
        return directory

    def _list_files(self) -> tuple[str, dict[str, int]]:
        """Return the commit of the revision, and the size of each of its files in bytes."""
        with self._errors_explained("the list of files"):
            info = huggingface_hub.HfApi().model_info(
                self.model, revision=self.revision, files_metadata=True, token=self.token
            )
        return info.sha or self.revision, {file.rfilename: file.size or 0 for file in info.siblings or []}

    def _cached_copy(self, error: D2QError) -> Path:
        config = huggingface_hub.try_to_load_from_cache(self.model, "config.json", revision=self.revision)
        if not isinstance(config, str):
            raise error
        directory = Path(config).parent
        sharded = (directory / INDEX_FILE).exists() and not (directory / SINGLE_FILE).exists()
        weights = indexed_files(directory / INDEX_FILE) if sharded else [SINGLE_FILE]
        if missing := [name for name in weights if not (directory / name).exists()]:
            raise D2QError(f"{error} (the cached copy in {directory} lacks {missing[0]})") from error
        if not constants.is_offline_mode():
            print(f"{error}; using the cached copy in {directory}", file=sys.stderr)
        return directory

    def _check_files(self, names: dict[str, int]) -> None:
        if ADAPTER_FILES[0] in names and "config.json" not in names:
            raise D2QError(
                f"{self.model} is a PEFT adapter, not a model; run d2q-edge convert BASE --adapter {self.model}, where "
                "BASE is the model that it was trained on"
            )
        if SINGLE_FILE not in names and INDEX_FILE not in names:
            if any(name.endswith(PICKLES) for name in names):
                raise D2QError(
                    f"{self.model} has its weights as PyTorch pickle files only, which can run any code when they are "
                    "loaded; look for a safetensors version"
                )
            raise D2QError(f"{self.model} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there")
        if "config.json" not in names:
            raise D2QError(f"{self.model} has no config.json, so it isn't a model that can be converted")

    def _check_space(self, needed: int, directory: Path) -> None:
        free = shutil.disk_usage(directory).free
        if needed > free:
            raise D2QError(
                f"{self.model} needs {needed / 2**30:.1f} GiB more in {constants.HF_HUB_CACHE}, which has "
                f"{free / 2**30:.1f} GiB of free space; free some, or set HF_HUB_CACHE to another directory"
            )

    @contextmanager
    def _errors_explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # Errors of huggingface_hub's HTTP client pass through it; they have no base class in common with its own.
            cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else None
            raise D2QError(self._explain(what, cause or error)) from error

    def _explain(self, what: str, error: BaseException) -> str:
        model, endpoint, cache = self.model, constants.ENDPOINT, constants.HF_HUB_CACHE
        status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
        if isinstance(error, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)):
            return (
                f"there is no directory {model}, and the model of that name isn't in {cache}, but HF_HUB_OFFLINE "
                "forbids fetching it; unset it, or give a directory"
            )
        if isinstance(error, errors.GatedRepoError) or status == 403:
            return (
                f"{model} is gated: accept its terms at {endpoint}/{model}, and set HF_TOKEN to a token of that account"
            )
        if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
            reader = "the token in HF_TOKEN" if self.token else "everybody"
            return (
                f"there is no directory {model}, and no model of that name that is visible to {reader} at {endpoint}; "
                "check the spelling, or set HF_TOKEN to a token that may read it"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return f"{model} has no revision {self.revision}; see {endpoint}/{model}/tree/main"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return (
                f"the disk of {cache} is full, so {what} of {model} could not be stored; free some space and run the "
                "same command"
            )
        later = "run the same command later to continue with the files that are missing"
        if status is not None:
            reason = "too many requests" if status == 429 else f"HTTP status {status}"
            return f"{endpoint} refuses {what} of {model} for now ({reason}); {later}"
        detail = (str(error).splitlines() or [""])[0]
        return f"the connection to {endpoint} failed at {what} of {model} ({type(error).__name__}: {detail}); {later}"
