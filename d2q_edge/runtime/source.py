"""Fetch llama-cpp-python's source distribution, and apply cpp_patch/ to it."""

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

from d2q_edge.errors import D2QError
from d2q_edge.runtime.process import run_logged, say
from d2q_edge.utils.machine import user_cache

PACKAGE = "llama-cpp-python"
VERSION = "0.3.36"
SDIST = f"llama_cpp_python-{VERSION}.tar.gz"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
SDIST_MEGABYTES = 77
BUILD_BACKEND = "scikit_build_core"
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
OWN_SOURCES = Path("vendor/llama.cpp/ggml/src/d2q")
"""Where the files of cpp_patch/src go in the unpacked tree."""
HASH_LENGTH = 12


def cache_directory() -> Path:
    """Return the directory of source, wheels, tools and logs: d2q-edge/runtime in the user's cache directory."""
    return user_cache() / "runtime"


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
    target = _cached_sdist()
    if target.is_file() and _sha256(target) == sha256:
        return target
    say(f"Downloading the source of {PACKAGE} {VERSION} ({SDIST_MEGABYTES} MB)")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        # pip builds metadata to download; only this package may come as source, its build tools come as wheels.
        command = [*PIP, "download", "--no-deps", *_progress_bar(), *isolation()]
        command += ["--no-binary", PACKAGE, "-d", temporary, f"{PACKAGE}=={VERSION}"]
        failure = (
            f"can't download {PACKAGE} {VERSION} with pip (is the network up, and the proxy set in HTTPS_PROXY?); "
            f"without a network: d2q-edge runtime install --sdist {SDIST}"
        )
        run(command, log, failure, description="Downloading", env=pip_variables())
        downloaded = Path(temporary) / SDIST
        if not downloaded.is_file():
            raise D2QError(f"pip downloaded no {SDIST}; see {log}")
        if (actual := _sha256(downloaded)) != sha256:
            raise D2QError(f"the downloaded {SDIST} is not the expected file (SHA-256 {actual}); try another index")
        downloaded.replace(target)
    return target


def add_sdist(given: Path, *, sha256: str = SDIST_SHA256) -> None:
    """Copy the source distribution, which the user has, into the cache, where builds take it from.

    Raises:
        D2QError: it can't be read, or is another file.
    """
    target = _cached_sdist()
    try:
        actual = _sha256(given)
    except OSError as error:
        raise D2QError(f"can't read {given} ({error.strerror}); the runtime is built from {SDIST}") from error
    if actual != sha256:
        version = _sdist_version(given)
        what = f"has version {version} of {PACKAGE}" if version not in (None, VERSION) else f"has SHA-256 {actual}"
        raise D2QError(
            f"{given} isn't {SDIST}, which the runtime is built from: it {what}; the right file has SHA-256 {sha256}, "
            f"and PyPI has it (pip download --no-deps --no-binary {PACKAGE} {PACKAGE}=={VERSION})"
        )
    if target.is_file() and _sha256(target) == sha256:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        shutil.copyfile(given, Path(temporary) / SDIST).replace(target)


def pip_variables() -> dict[str, str]:
    """Return variables for pip: what it tries again would be seen in the log only, so the user has to ask for that."""
    return {"PIP_RETRIES": os.environ.get("PIP_RETRIES", "0")}


def isolation() -> list[str]:
    """Return pip's arguments for builds: none of its isolated environments, which it downloads, without need."""
    return ["--no-build-isolation"] if importlib.util.find_spec(BUILD_BACKEND) else []


def _progress_bar() -> list[str]:
    """Return pip's arguments for a progress that can be read, where it is new enough to have that."""
    found = re.match(r"(\d+)\.(\d+)", importlib.metadata.version("pip"))
    return ["--progress-bar", "raw"] if found and (int(found[1]), int(found[2])) >= (24, 1) else []


def _cached_sdist() -> Path:
    return cache_directory() / "sdist" / SDIST


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _sdist_version(path: Path) -> str | None:
    """Return which version of llama-cpp-python a file is the source distribution of; None if it isn't one."""
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if found := re.match(r"llama_cpp_python-([^/]+)(/|$)", member.name):
                    return found[1]
                return None
    except (OSError, tarfile.TarError, EOFError, zlib.error):
        pass
    return None


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
