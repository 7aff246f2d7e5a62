"""gguf_init_from_file of some build of libggml-base: does it accept a file, and what does it say?"""

import ctypes
from pathlib import Path


class _Parameters(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def accepts(library: ctypes.CDLL, path: Path) -> bool:
    """Whether the library reads the file's header; its message goes to the process's stderr."""
    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_init_from_file.argtypes = (ctypes.c_char_p, _Parameters)
    return library.gguf_init_from_file(str(path).encode(), _Parameters(True, None)) is not None
