"""Call gguf_init_from_file of a build of libggml-base."""

import ctypes
from pathlib import Path


class _Parameters(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def accepts(library: ctypes.CDLL, path: Path) -> bool:
    """Return whether the library accepts the file's header; it prints its message to stderr."""
    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_init_from_file.argtypes = (ctypes.c_char_p, _Parameters)
    return library.gguf_init_from_file(str(path).encode(), _Parameters(True, None)) is not None
