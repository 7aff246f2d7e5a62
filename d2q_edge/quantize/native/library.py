"""Compile the C sources into a shared library in the user's cache directory, and load it.

The file's name has a hash of the sources, the flags and the CPU, and one of the file's own content: a library that is
damaged, or was made for another machine, is not loaded but made again.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from d2q_edge.errors import printable
from d2q_edge.utils.machine import cache_key, user_cache

SOURCES = Path(__file__).parent
COMPILERS = "cc", "gcc", "clang"
NATIVE = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
FLAGS = "-std=gnu11", "-O3", NATIVE, "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC"
HASH_LENGTH = 16


@cache
def library() -> ctypes.CDLL | None:
    """Return the library; None where it can't be made, which is said on stderr once."""
    try:
        return load(user_cache() / "native")
    except OSError as error:
        reason = printable(" ".join(str(error).split()))
    print(f"Quantizing takes several times as long without a C compiler ({reason}).", file=sys.stderr, flush=True)
    return None


def load(directory: Path) -> ctypes.CDLL:
    """Load the library from a directory, which it is compiled into if it isn't there.

    Raises:
        OSError: no compiler works, or what it makes can't be loaded.
    """
    key = cache_key(_source_hash())
    for path in sorted(directory.glob(f"{key}-*.so")):
        with suppress(OSError):
            if path.name == _file_name(key, path):
                return ctypes.CDLL(str(path))
        with suppress(OSError):
            path.unlink()
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "library.so"
        _compile(made)
        # Without a cache the library is compiled again by the next process.
        with suppress(OSError):
            return ctypes.CDLL(str(_keep(made, directory, key)))
        return ctypes.CDLL(str(made))


def _source_hash() -> str:
    digest = hashlib.sha256(repr(FLAGS).encode())
    for path in sorted(SOURCES.glob("*.[ch]")):
        digest.update(f"{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:HASH_LENGTH]


def _file_name(key: str, path: Path) -> str:
    return f"{key}-{hashlib.sha256(path.read_bytes()).hexdigest()[:HASH_LENGTH]}.so"


def _compile(target: Path) -> None:
    """Compile with CC, if that is set, or else with the first compiler that works."""
    chosen = os.environ.get("CC", "").split()
    reason = "none is installed"
    for program, *arguments in [chosen] if chosen else [[name] for name in COMPILERS]:
        if shutil.which(program):
            sources = map(str, sorted(SOURCES.glob("*.c")))
            command = [program, *arguments, *FLAGS, "-o", str(target), *sources, "-lm"]
            result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
            if not result.returncode and target.is_file():
                return
            lines = [line for line in result.stderr.splitlines() if "error" in line]
            reason = " ".join([f"{program} fails", *lines[:1]])
    raise OSError(reason)


def _keep(made: Path, directory: Path, key: str) -> Path:
    """Put the library into the directory under its name, all of it or nothing."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / _file_name(key, made)
    handle, partial = tempfile.mkstemp(dir=directory, suffix=".partial")
    os.close(handle)
    try:
        shutil.copyfile(made, partial)
        Path(partial).replace(path)
    finally:
        Path(partial).unlink(missing_ok=True)
    return path
