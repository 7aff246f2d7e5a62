"""What is installed: the patched package, its types, llama.cpp's tools. Builds nothing and changes nothing."""

import ctypes
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from d2q_edge.errors import D2QError
from d2q_edge.formats.codebooks import TABLE_SHA256
from d2q_edge.formats.tensor_types import ALL
from d2q_edge.runtime.source import PACKAGE, VERSION, cache_directory, patch_hash
from d2q_edge.utils.machine import cache_key

TOOLS = ("llama-quantize", "llama-imatrix", "llama-perplexity", "llama-bench")
INSTALL = "run `d2q-edge runtime install`"
PATCHED = re.compile(re.escape(VERSION) + r"\+d2q\.([0-9a-f]+)")
CACHED_WHEEL = re.compile(r"/([0-9a-f]+-[0-9a-f]{8})/wheel/[^/]+\.whl$")
"""How the address of a wheel in the cache ends; the group is machine.cache_key."""


@dataclass(frozen=True)
class RuntimeInfo:
    """DESIGN section 8: what `d2q-edge runtime info` says. None stands for what is not installed."""

    version: str | None
    patch_hash: str | None
    types: list[str]
    library: str | None
    tools: dict[str, str | None]

    def to_json(self) -> dict[str, Any]:
        """The same as plain values, for json.dump."""
        return asdict(self)


def _shared(directory: Path, name: str) -> Path | None:
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    path = directory / f"{'' if sys.platform == 'win32' else 'lib'}{name}{suffix}"
    return path if path.is_file() else None


def library_directory() -> Path | None:
    """The folder of the installed llama_cpp's shared libraries, found without importing it."""
    try:
        spec = importlib.util.find_spec("llama_cpp")
    except ValueError:  # somebody has put a module without a spec into sys.modules
        return None
    if spec is None or spec.origin is None:
        return None
    directory = Path(spec.origin).parent / "lib"
    return directory if directory.is_dir() else None


def installed_version() -> str | None:
    """Version of the installed llama-cpp-python, patched or not; None without one."""
    try:
        return importlib.metadata.version(PACKAGE)
    except (importlib.metadata.PackageNotFoundError, KeyError):  # the second: an emptied dist-info, newer Pythons
        return None


def installed_key() -> str | None:
    """The cache's folder that the installed wheel came from, named by machine.cache_key; None where that isn't known.

    The version says which patch it is, this also with which CMAKE_ARGS and for which CPU it was built. pip notes where
    a wheel came from (PEP 610), and the note goes when the package is removed or replaced. Another address than one in
    the cache, such as an editable installation's, says nothing.
    """
    try:
        note = importlib.metadata.distribution(PACKAGE).read_text("direct_url.json")
        found = CACHED_WHEEL.search(json.loads(note or "{}")["url"])
    except (importlib.metadata.PackageNotFoundError, LookupError, TypeError, ValueError):  # none, or not as pip's
        return None
    return found.group(1) if found else None


def _base_library() -> ctypes.CDLL | None:
    """libggml-base of the installed package, if it has our types."""
    directory = library_directory()
    path = _shared(directory, "ggml-base") if directory else None
    if path is None:
        return None
    try:
        library = ctypes.CDLL(str(path))
        library.ggml_d2q_table_sha256.restype = ctypes.c_char_p
        library.ggml_type_name.restype = ctypes.c_char_p
    except (OSError, AttributeError):
        return None
    return library


def tools_directory() -> Path:
    """Where `runtime install --tools` has put the tools of this patch for this machine.

    They lie beside the installed wheel: CMAKE_ARGS, which the key of this moment depends on, may have been set only for
    the installation. After an update of d2q-edge the installed wheel can be of another patch; its tools don't count.
    """
    patch, key = patch_hash(), installed_key()
    return cache_directory() / (key if key and key.startswith(f"{patch}-") else cache_key(patch)) / "tools"


def tool_in(directory: Path, name: str) -> Path | None:
    """The program of a tool in a folder of tools, if it is there."""
    path = directory / (name + (".exe" if sys.platform == "win32" else ""))
    return path if path.is_file() else None


def info() -> RuntimeInfo:
    """Describe what is installed in this environment and in the cache; never fails because something is missing."""
    version = installed_version()
    patched = PATCHED.fullmatch(version or "")
    directory = library_directory()
    library = _shared(directory, "llama") if directory else None
    base = _base_library() if patched else None
    names = [base.ggml_type_name(t.id) for t in ALL] if base else []
    tools = tools_directory()
    return RuntimeInfo(
        version=version,
        patch_hash=patched.group(1) if patched else None,
        types=[name.decode() for name in names if name],
        library=str(library) if library else None,
        tools={name: str(path) if (path := tool_in(tools, name)) else None for name in TOOLS},
    )


def find_tool(name: str) -> Path:
    """Path of one of TOOLS, built from the current patch for this machine.

    Raises:
        D2QError: it has not been built.
    """
    path = tool_in(tools_directory(), name)
    if path is None:
        raise D2QError(f"the tool {name} is not built: run `d2q-edge runtime install --tools`")
    return path


def tool_environment() -> dict[str, str]:
    """Environment variables for a tool.

    With passive waiting, which torch prefers on a busy machine, every barrier of llama.cpp's threads is a sleep.
    """
    return {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}


def run_tool(name: str, *arguments: object) -> str:
    """What one of TOOLS prints on stdout, with `arguments` as words.

    Raises:
        D2QError: it has not been built, or it fails; the message ends with what it said.
    """
    command = [str(find_tool(name)), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=tool_environment())
    if result.returncode:
        raise D2QError(f"{name} failed: {' '.join(command)}\n{result.stderr[-2000:]}")
    return result.stdout


def require() -> ModuleType:
    """Import llama_cpp after checking that it is patched and has this package's codebook tables.

    Raises:
        D2QError: it is missing, stock, broken or made with other tables; the message says what to run.
    """
    version = installed_version()
    if version is None or library_directory() is None:
        raise D2QError(f"the runtime (a patched {PACKAGE}) is not installed: {INSTALL}")
    if PATCHED.fullmatch(version) is None:
        raise D2QError(f"{PACKAGE} {version} is installed without the d2q types: {INSTALL} to replace it")
    base = _base_library()
    if base is None:
        raise D2QError(f"the libraries of {PACKAGE} {version} can't be loaded: {INSTALL} again")
    if base.ggml_d2q_table_sha256().decode() != TABLE_SHA256:
        raise D2QError(f"{PACKAGE} {version} was built with other codebook tables: {INSTALL} again")
    return importlib.import_module("llama_cpp")
