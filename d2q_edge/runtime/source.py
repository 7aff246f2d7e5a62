"""Fetch llama-cpp-python's source distribution, and apply cpp_patch/ to it."""

import hashlib
import os
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from d2q_edge.errors import D2QError
from d2q_edge.runtime.process import run_logged, say

PACKAGE = "llama-cpp-python"
VERSION = "0.3.36"
SDIST = f"llama_cpp_python-{VERSION}.tar.gz"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
OWN_SOURCES = Path("vendor/llama.cpp/ggml/src/d2q")
"""Where the files of cpp_patch/src go in the unpacked tree."""
HASH_LENGTH = 12


def cache_directory() -> Path:
    """Return the directory of source, wheels, tools and logs: d2q-edge/runtime in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "d2q-edge" / "runtime"


def patch_directory() -> Path:
    """Return cpp_patch/: inside the installed package or beside it, or raise a D2QError if it is missing."""
    package = Path(__file__).resolve().parents[1]
    for directory in (package / "cpp_patch", package.parent / "cpp_patch"):
        if (directory / "patches").is_dir():
            return directory
    raise D2QError(f"cpp_patch is missing beside {package}; reinstall d2q-edge")


def _inputs(directory: Path) -> list[Path]:
    """List the files of cpp_patch in the order in which they are hashed and applied."""
    return sorted(directory.glob("patches/*.patch")) + sorted(p for p in directory.glob("src/*") if p.is_file())


def patch_hash(directory: Path | None = None) -> str:
    """Return twelve hex digits of a hash over the distribution's checksum, all patches and our own sources."""
    directory = directory or patch_directory()
    return _hash(directory, _inputs(directory))


def server_hash(directory: Path | None = None) -> str:
    """Return the same over the distribution's checksum and the patches of llama-server alone."""
    directory = directory or patch_directory()
    return _hash(directory, _server_patches(directory))


def _server_patches(directory: Path) -> list[Path]:
    """List the patches that only llama-server's build needs: no change of them rebuilds the wheel and the tools."""
    return sorted(directory.glob("server/*.patch"))


def _hash(directory: Path, paths: list[Path]) -> str:
    digest = hashlib.sha256(SDIST_SHA256.encode())
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(directory).as_posix()} {len(content)}\n".encode() + content)
    text = digest.hexdigest()
    # A local version of digits only would lose its leading zeros (PEP 440).
    return next(part for at in range(len(text)) if not (part := text[at : at + HASH_LENGTH]).isdigit())


def runtime_version() -> str:
    """Return the version of the patched package: the release's, with the patch hash as local version."""
    return f"{VERSION}+d2q.{patch_hash()}"


def fetch_sdist(log: Path, *, run: Callable[..., None] = run_logged, sha256: str = SDIST_SHA256) -> Path:
    """Return the source distribution in the cache; download it with pip if it is missing or damaged.

    Args:
        log: file that gets pip's output.
        run: runs pip as run_logged does.
        sha256: checksum that the file must have.

    Raises:
        D2QError: no network, no pip, or the downloaded file is not the expected one.
    """
    target = cache_directory() / "sdist" / SDIST
    if target.is_file() and hashlib.sha256(target.read_bytes()).hexdigest() == sha256:
        return target
    say(f"Downloading the source of {PACKAGE} {VERSION}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
        # pip builds metadata to download; only this package may come as source, its build tools come as wheels.
        command = [*pip, "--no-binary", PACKAGE, "-d", temporary, f"{PACKAGE}=={VERSION}"]
        run(command, log, f"can't download {PACKAGE} {VERSION} with pip (is the network up?)")
        downloaded = Path(temporary) / SDIST
        if not downloaded.is_file():
            raise D2QError(f"pip downloaded no {SDIST}; see {log}")
        if (actual := hashlib.sha256(downloaded.read_bytes()).hexdigest()) != sha256:
            raise D2QError(f"the downloaded {SDIST} is not the expected file (SHA-256 {actual}); try another index")
        downloaded.replace(target)
    return target


def unpack(sdist: Path, destination: Path) -> None:
    """Unpack the source distribution without its top folder and .git; refuse what would land outside `destination`."""
    with tarfile.open(sdist) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.10.12 and 3.11.4 have it
        members = [member for member in archive if (Path(member.name).parts[1:] or [".git"])[0] != ".git"]
        for member in members:
            member.name = member.name.partition("/")[2]
            if ".." in member.name.split("/") or not (member.isfile() or member.isdir()):
                raise D2QError(f"{SDIST} contains {member.name}, which is not a plain file inside it")
        archive.extractall(destination, members)


def prepare(destination: Path, log: Path) -> None:
    """Make the patched tree in `destination`, which must not exist.

    Raises:
        D2QError: the source can't be fetched, or a patch does not apply.
    """
    unpack(fetch_sdist(log), destination)
    apply(patch_directory(), destination, log)


def apply(directory: Path, tree: Path, log: Path) -> None:
    """Apply cpp_patch in `directory` to the unpacked source distribution: own sources, patches in order, the version.

    Raises:
        D2QError: a patch does not apply to this tree.
    """
    own = tree / OWN_SOURCES
    own.mkdir()
    for path in _inputs(directory):
        if path.suffix == ".patch":
            _apply_patch(path, tree, log)
        else:
            shutil.copyfile(path, own / path.name)
    module = tree / "llama_cpp" / "__init__.py"
    version = f"{VERSION}+d2q.{patch_hash(directory)}"
    text, count = re.subn(rf'__version__ = "{re.escape(VERSION)}"', f'__version__ = "{version}"', module.read_text())
    if count != 1:
        raise D2QError(f"{module} has no line with version {VERSION}")
    module.write_text(text)


def apply_server(directory: Path, tree: Path, log: Path) -> None:
    """Apply the patches of llama-server to a tree that `apply` has patched; errors as there."""
    for path in _server_patches(directory):
        _apply_patch(path, tree, log)


def _apply_patch(path: Path, tree: Path, log: Path) -> None:
    command = ["patch", "-p1", "--batch", "--forward", "--fuzz=0", "-i", path.resolve()]
    run_logged(command, log, f"the patch {path.name} does not apply to {PACKAGE} {VERSION}", cwd=tree)
