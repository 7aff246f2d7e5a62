"""Fixtures of the kernel tests: the installed runtime's libraries, the patched source tree."""

import os
from pathlib import Path
from typing import NoReturn

import pytest

from d2q_edge.errors import D2QError
from d2q_edge.runtime import source
from d2q_edge.runtime.installed import info, library_directory
from tests.kernels.ggml import Ggml


def unavailable(reason: str) -> NoReturn:
    """Skip, or fail where a skipped test would hide a broken runtime (D2Q_REQUIRE_RUNTIME=1)."""
    if os.environ.get("D2Q_REQUIRE_RUNTIME") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def ggml() -> Ggml:
    """The libraries of the installed runtime, which must be built from this checkout's cpp_patch."""
    installed = info()
    directory = library_directory()
    if installed.patch_hash is None or directory is None:
        unavailable("the patched runtime is not installed: run `d2q-edge runtime install`")
    if installed.patch_hash != source.patch_hash():
        unavailable(f"the installed runtime {installed.version} is of another patch: run `d2q-edge runtime install`")
    return Ggml(directory)


def _sdist(log: Path) -> Path:
    try:
        return source.fetch_sdist(log)
    except D2QError as error:
        unavailable(str(error))


@pytest.fixture(scope="session")
def pristine_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution. Tests must not change it."""
    work = tmp_path_factory.mktemp("pristine")
    source.unpack(_sdist(work / "log"), work / "tree")
    return work / "tree"


@pytest.fixture(scope="session")
def patched_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution with cpp_patch applied. Tests must not change it."""
    work = tmp_path_factory.mktemp("patched")
    source.unpack(_sdist(work / "log"), work / "tree")
    source.apply(source.patch_directory(), work / "tree", work / "log")
    return work / "tree"
