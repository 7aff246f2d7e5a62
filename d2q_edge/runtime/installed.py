"""Find the installed llama-cpp-python, describe it, and check that it is the patched one."""

import ctypes
import importlib
import importlib.metadata
import importlib.util
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from d2q_edge.errors import D2QError
from d2q_edge.formats.codebooks import TABLE_SHA256
from d2q_edge.formats.tensor_types import ALL
from d2q_edge.runtime.source import PACKAGE, VERSION
from d2q_edge.runtime.tools import INSTALLED, SERVER, TOOLS, Tools, server_directory

INSTALL = "run `d2q-edge runtime install`"
PATCHED = re.compile(re.escape(VERSION) + r"\+d2q\.([0-9a-f]+)")


@dataclass(frozen=True)
class RuntimeInfo:
    """What is installed; None stands for what is not.

    Attributes:
        version: of llama-cpp-python.
        patch_hash: of the patch that it was built with; None for the stock package.
        types: our tensor types that it has.
        library: path of libllama.
        tools: path of each of llama.cpp's tools.
        server: path of llama-server.
    """

    version: str | None
    patch_hash: str | None
    types: list[str]
    library: str | None
    tools: dict[str, str | None]
    server: str | None

    def to_json(self) -> dict[str, Any]:
        """Return plain values for json.dump."""
        return asdict(self)


def info() -> RuntimeInfo:
    """Describe what is installed in this environment and in the cache; what is missing is no error."""
    version, library = installed_version(), _library("llama")
    patched = PATCHED.fullmatch(version or "")
    base = _base_library() if patched else None
    types = [name.decode() for tensor_type in ALL if base and (name := base.ggml_type_name(tensor_type.id))]
    tools = {name: str(path) if (path := INSTALLED.path(name)) else None for name in TOOLS}
    server = Tools(server_directory()).path(SERVER)
    paths = [str(path) if path else None for path in (library, server)]
    return RuntimeInfo(version, patched and patched[1], types, paths[0], tools, paths[1])


def require() -> ModuleType:
    """Import llama_cpp after checking that it is patched and has our codebook tables.

    Raises:
        D2QError: it is missing, stock, broken or built with other tables; the message says what to run.
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


def installed_version() -> str | None:
    """Return the version of the installed llama-cpp-python, patched or not; None without one."""
    try:
        return importlib.metadata.version(PACKAGE)
    except (importlib.metadata.PackageNotFoundError, KeyError):  # KeyError: an emptied dist-info, in newer Pythons
        return None


def library_directory() -> Path | None:
    """Return the directory of the installed llama_cpp's shared libraries, without importing it; None without one."""
    try:
        spec = importlib.util.find_spec("llama_cpp")
    except ValueError:  # sys.modules has a module without a spec
        return None
    directory = Path(spec.origin).parent / "lib" if spec and spec.origin else None
    return directory if directory and directory.is_dir() else None


def _library(name: str) -> Path | None:
    """Return the path of a shared library of the package ("llama", "ggml-base"), if it is there."""
    directory = library_directory()
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    path = directory / f"{'' if sys.platform == 'win32' else 'lib'}{name}{suffix}" if directory else None
    return path if path and path.is_file() else None


def _base_library() -> ctypes.CDLL | None:
    """Return libggml-base of the package, if it can be loaded and has our types."""
    if (path := _library("ggml-base")) is None:
        return None
    try:
        library = ctypes.CDLL(str(path))
        library.ggml_d2q_table_sha256.restype = ctypes.c_char_p
        library.ggml_type_name.restype = ctypes.c_char_p
    except (OSError, AttributeError):
        return None
    return library
