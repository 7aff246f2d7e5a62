"""Models by their Hugging Face id: which files are needed, and getting them into the hub's cache.

huggingface_hub does the transfers: it checks sizes, goes on where a connection broke, keeps complete files in its
cache, which other programs share, and serves from there when there is no network. This module decides what is fetched
(never pickles), knows where a cached model lies, and says in one sentence what went wrong. It reads no weights.

The token for gated and private models comes from the environment only: HF_TOKEN.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils.tqdm import disable_progress_bars

from d2q_edge.errors import D2QError
from d2q_edge.utils.json_files import read_json_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SMALL_FILES = (
    "README.md",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
"""What is fetched beside config.json and the weights, where the repository has it."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_ID = re.compile(r"(?!.*(--|\.\.))(?!.*\.git$)[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9]([\w.-]{0,94}\w)?", re.ASCII)
"""As huggingface_hub validates them."""
_TEMPLATE = re.compile(r"(additional_chat_templates/)?[\w.-]+\.jinja")
_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)", re.ASCII)

T = TypeVar("T")


class Repository(NamedTuple):
    """A model on the hub: its id ("Qwen/Qwen3-8B") and the commit that is meant."""

    id: str
    commit: str

    @property
    def url(self) -> str:
        return f"https://huggingface.co/{self.id}"


def locate(model: str | Path, revision: str | None = None) -> Path:
    """The directory that holds a model: the given one, or the hub's cache, into which it is fetched where needed.

    A directory wins over an id of the same spelling.

    Args:
        model: a directory, or a Hugging Face id.
        revision: branch, tag or commit of an id; None is its main branch.

    Raises:
        D2QError: the model can't be fetched, has no safetensors weights, or a revision is given for a directory.
    """
    directory = Path(model).expanduser()
    if not _ID.fullmatch(str(model)) or directory.exists():
        if revision is not None:
            raise D2QError(f"{model} is not a Hugging Face id, so --revision has no meaning; leave it out")
        return directory
    return _Download(str(model), revision or constants.DEFAULT_REVISION).run()


def repository(directory: Path) -> Repository | None:
    """Which model lies in this directory of the hub's cache (`models--ORG--NAME/snapshots/COMMIT`); None elsewhere."""
    directory = directory.resolve()
    match = _SNAPSHOT.fullmatch(directory.parent.parent.name)
    if match is None or directory.parent.name != "snapshots":
        return None
    return Repository(f"{match[1]}/{match[2]}", directory.name)


def blob_directories(directory: Path) -> tuple[Path, ...]:
    """Where the symbolic links of a directory of the hub's cache may lead: the contents of all revisions, and those
    that repositories share."""
    directory = directory.resolve()
    if repository(directory) is None:
        return ()
    storage = directory.parent.parent
    return storage / "blobs", storage.parent / "blobs"


def weight_files(index: Path) -> list[str]:
    """The files that an index of weights names, sorted.

    Raises:
        D2QError: the index is damaged, or names something that isn't a plain name of a safetensors file.
    """
    weight_map = read_json_object(index, strict=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise D2QError(f"{index} has no weight_map that says which tensor is in which file")
    for name, file in weight_map.items():
        if (
            not isinstance(file, str)
            or not re.fullmatch(r"[\w+-][\w.+ -]*\.safetensors", file)
            or not name.isprintable()
        ):
            raise D2QError(
                f"{index} places tensor {name!r} in {file!r}, which isn't the plain name of a .safetensors file"
            )
    return sorted(set(weight_map.values()))


class _Download:
    """One revision of one model."""

    def __init__(self, model: str, revision: str) -> None:
        self.model, self.revision = model, revision
        # False: not the one that `hf auth login` has stored either.
        self.token: str | bool = os.environ.get("HF_TOKEN") or False

    def run(self) -> Path:
        """Fetch what isn't in the cache yet; returns the directory there."""
        if not sys.stderr.isatty():
            disable_progress_bars()
        try:
            commit, sizes = self._list(self.revision)
        except D2QError as error:
            return self._cached(error)
        self._check_weights(sizes)
        # By the name of the revision, so that the cache knows what it means. The branch may have moved since.
        directory = self._get("config.json", self.revision).parent
        if directory.name != commit:
            commit, sizes = self._list(directory.name)
            self._check_weights(sizes)
        for name in sizes:
            if name in SMALL_FILES or _TEMPLATE.fullmatch(name):
                self._get(name, commit)
        weights = [SINGLE_FILE]
        if SINGLE_FILE not in sizes:
            weights = weight_files(self._get(INDEX_FILE, commit))
            if absent := [name for name in weights if name not in sizes]:
                raise D2QError(f"{INDEX_FILE} of {self.model} names {absent[0]}, but the repository has no such file")
        self._check_space({name: sizes[name] for name in weights if not (directory / name).exists()}, directory)
        for name in weights:
            self._get(name, commit)
        return directory

    def _cached(self, error: D2QError) -> Path:
        """The directory in the cache, where the hub can't be asked."""
        config = huggingface_hub.try_to_load_from_cache(self.model, "config.json", revision=self.revision)
        if not isinstance(config, str):
            raise error
        directory = Path(config).parent
        if missing := _missing(directory):
            raise D2QError(f"{error} (the cached copy in {directory} lacks {missing})") from error
        if not constants.is_offline_mode():
            print(f"{error}; going on with the cached copy in {directory}", file=sys.stderr)
        return directory

    def _get(self, name: str, revision: str) -> Path:
        return Path(
            self._call(
                name,
                lambda: huggingface_hub.hf_hub_download(
                    self.model, name, revision=revision, token=self.token, library_name="d2q-edge"
                ),
            )
        )

    def _list(self, revision: str) -> tuple[str, dict[str, int]]:
        """The commit that is meant, and the repository's files with their sizes."""
        api = huggingface_hub.HfApi(token=self.token, library_name="d2q-edge")
        info = self._call(
            "the list of files", lambda: api.model_info(self.model, revision=revision, files_metadata=True)
        )
        return info.sha or revision, {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}

    def _check_weights(self, files: Mapping[str, int]) -> None:
        """Before anything is fetched."""
        if SINGLE_FILE in files or INDEX_FILE in files:
            return
        if any(name.endswith(PICKLES) for name in files):
            raise D2QError(
                f"{self.model} has its weights as PyTorch pickle files only, which can run any code when they are "
                "loaded; look for a safetensors version"
            )
        raise D2QError(f"{self.model} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there")

    def _check_space(self, sizes: dict[str, int], directory: Path) -> None:
        needed, free = sum(sizes.values()), shutil.disk_usage(directory).free
        if needed > free:
            raise D2QError(
                f"{self.model} needs {needed / 2**30:.1f} GiB more in {constants.HF_HUB_CACHE}, which has "
                f"{free / 2**30:.1f} GiB of free space; free some, or set HF_HUB_CACHE to another directory"
            )

    def _call(self, what: str, call: Callable[[], T]) -> T:
        """The result of a function of huggingface_hub.

        Raises:
            D2QError: it failed.
        """
        try:
            return call()
        except Exception as error:
            # The library lets those of its HTTP client through, which has changed twice: they have no common base.
            raise self._explain(what, error) from error

    def _explain(self, what: str, error: BaseException) -> D2QError:
        model, endpoint = self.model, constants.ENDPOINT
        if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
            error = error.__cause__
        status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
        if isinstance(error, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)):
            return D2QError(
                f"there is no directory {model}, and the model of that name isn't in {constants.HF_HUB_CACHE}, but "
                "HF_HUB_OFFLINE forbids to fetch it; unset it, or give a directory"
            )
        if isinstance(error, errors.GatedRepoError) or status == 403:
            return D2QError(
                f"{model} is gated: accept its terms at {endpoint}/{model}, and set HF_TOKEN to a token of that account"
            )
        if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
            token = "the token in HF_TOKEN" if self.token else "everybody"
            return D2QError(
                f"there is no directory {model}, and no model of that name that {token} may see at {endpoint}; check "
                "the spelling, or set HF_TOKEN to a token that may"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return D2QError(f"{model} has no revision {self.revision}; see {endpoint}/{model}/tree/main")
        if isinstance(error, errors.EntryNotFoundError):
            return D2QError(f"{model} has no {what}, so it isn't a model that can be converted")
        later = "run the same command later, and it goes on with the files that are missing"
        if status is not None:
            reason = "too many requests" if status == 429 else f"HTTP status {status}"
            return D2QError(f"{endpoint} refuses {what} of {model} for now ({reason}); {later}")
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return D2QError(
                f"the disk of {constants.HF_HUB_CACHE} is full, so {what} of {model} could not be kept; free some "
                "space and run the same command"
            )
        detail: Any = str(error).splitlines()[:1] or [""]
        return D2QError(
            f"the connection to {endpoint} failed at {what} of {model} ({type(error).__name__}: {detail[0]}); {later}"
        )


def _missing(directory: Path) -> str | None:
    """The first file that a conversion needs and a directory lacks."""
    needed = ["config.json", SINGLE_FILE]
    if (directory / INDEX_FILE).exists() and not (directory / SINGLE_FILE).exists():
        needed = ["config.json", *weight_files(directory / INDEX_FILE)]
    return next((name for name in needed if not (directory / name).exists()), None)
