"""Fixtures of the kernel tests: the installed runtime's libraries and the patched source tree."""

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from d2q_edge.runtime import source
from d2q_edge.runtime.installed import info, library_directory
from tests.availability import fetch_sdist, unavailable
from tests.kernels.ggml import Ggml


@pytest.fixture(autouse=True)
def log_on_stderr() -> Iterator[None]:
    """Send llama.cpp's messages to stderr, where these tests read them, and back to llama-cpp-python's log afterwards.

    LlamaModel, in earlier tests, turns them off.
    """
    if "llama_cpp" not in sys.modules:
        yield
        return
    import llama_cpp
    from llama_cpp._logger import llama_log_callback

    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(), ctypes.c_void_p(0))
    yield
    llama_cpp.llama_log_set(llama_log_callback, ctypes.c_void_p(0))


@pytest.fixture(scope="session")
def ggml() -> Ggml:
    """Load the libraries of the installed runtime, which must be built from this checkout's cpp_patch."""
    installed = info()
    directory = library_directory()
    if installed.patch_hash is None or directory is None:
        unavailable("the patched runtime is not installed: run `d2q-edge runtime install`")
    if installed.patch_hash != source.patch_hash():
        unavailable(f"the installed runtime {installed.version} is of another patch: run `d2q-edge runtime install`")
    return Ggml(directory)


@pytest.fixture(scope="session")
def patched_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack the source distribution and apply cpp_patch. Tests must not change it."""
    work = tmp_path_factory.mktemp("patched")
    source.unpack(fetch_sdist(work / "log"), work / "tree")
    source.apply(source.patch_directory(), work / "tree", work / "log")
    return work / "tree"
