"""Check what building the runtime needs before minutes go into it: programs, compilers that work, disk space."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from d2q_edge.errors import D2QError

NEEDED = {
    "a C compiler": ("cc", "gcc", "clang"),
    "a C++ compiler": ("c++", "g++", "clang++"),
    "make or ninja": ("ninja", "make"),
    "patch": ("patch",),
    "cmake": ("cmake",),
}
"""Programs for a build; one of each is enough."""
COMPILERS = {
    "a C compiler": ("CC", "c", "#include <stdio.h>\n"),
    "a C++ compiler": ("CXX", "c++", "#include <vector>\n"),
}
"""The variable that names one, its language, and what a program needs that isn't part of the compiler itself."""
MANAGERS = {
    "apt-get": ("apt install", "build-essential"),
    "dnf": ("dnf install", "gcc-c++ make"),
    "zypper": ("zypper install", "gcc-c++ make"),
    "pacman": ("pacman -S", "base-devel"),
    "apk": ("apk add", "build-base"),
}
"""Of Linux distributions: how to install packages, and those with the compilers and make; others have their name."""
MINIMUM_CMAKE = (3, 21)


def search_path() -> str:
    """Return PATH with this environment's programs first: cmake and ninja may come from pip."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def check_programs(path: str | None = None) -> None:
    """Check that the programs that a build needs are installed and work.

    Args:
        path: directories to look in, joined as in PATH; None takes this environment's and PATH.

    Raises:
        D2QError: names what is missing, and the packages that have it.
    """
    path = path or search_path()
    found = {name: _find(name, path) for name in NEEDED}
    if missing := [name for name, command in found.items() if command is None]:
        raise D2QError(f"to build the runtime, install {', '.join(missing)} first{_hint(missing, path)}")
    for name in COMPILERS:
        if reason := _fails(name, found[name] or [], path):
            raise D2QError(f"{name} is there, but doesn't work ({reason}): install it anew{_hint([name], path)}")
    output = subprocess.run([*(found["cmake"] or []), "--version"], capture_output=True, text=True).stdout
    version = re.search(r"(\d+)\.(\d+)", output)
    if version is None or (int(version[1]), int(version[2])) < MINIMUM_CMAKE:
        first = output.split("\n")[0].strip() or "an unknown version"
        raise D2QError(f"the runtime needs CMake 3.21 or newer, not {first}: pip install cmake")
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        raise D2QError(f"this Python has no pip: run {sys.executable} -m ensurepip")


def _find(name: str, path: str) -> list[str] | None:
    """Return the command for a need, or None. One that can't tell its version doesn't count.

    On a Mac without the developer tools, cc only offers to install them; BusyBox's patch lacks options that we use.
    """
    commands: list[Sequence[str]] = [(program,) for program in NEEDED[name]]
    if name in COMPILERS and (chosen := os.environ.get(COMPILERS[name][0], "").strip()):
        # CMake takes this one or none.
        commands = [(chosen,)] if shutil.which(chosen, path=path) else [chosen.split()]
    for program, *arguments in commands:
        if (there := shutil.which(program, path=path)) and _runs([there, *arguments, "--version"]):
            return [there, *arguments]
    return None


def _runs(command: Sequence[str]) -> bool:
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0
    except OSError:
        return False


def _fails(name: str, compiler: Sequence[str], path: str) -> str | None:
    """Build a small program; return why that fails, for example that the C library's headers are missing."""
    _, language, include = COMPILERS[name]
    with tempfile.TemporaryDirectory() as directory:
        command = [*compiler, "-x", language, "-", "-o", str(Path(directory) / "program")]
        code, env = f"{include}int main() {{ return 0; }}\n", {**os.environ, "PATH": path}
        result = subprocess.run(command, input=code, capture_output=True, text=True, errors="replace", env=env)
    if not result.returncode:
        return None
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), " ".join(lines[:1])) or f"exit code {result.returncode}"


def _hint(missing: Sequence[str], path: str) -> str:
    """Say what to run to install something; nothing where the package manager is unknown."""
    own = [name for name in missing if name in ("cmake", "patch")]
    compilers = len(own) < len(missing)
    commands = []
    if sys.platform == "darwin":
        commands = ["xcode-select --install"] * compilers + [f"brew install {' '.join(own)}"] * bool(own)
    elif manager := next((name for name in MANAGERS if shutil.which(name, path=path)), None):
        install, packages = MANAGERS[manager]
        commands = [" ".join([install, *[packages] * compilers, *own])]
    return f": {' && '.join(commands)}" if commands else ""


def check_space(directory: Path, size: int, remedy: str) -> None:
    """Raise a D2QError, which `remedy` ends, unless a directory has so many bytes of free space."""
    free = shutil.disk_usage(directory).free
    if free < size:
        raise D2QError(
            f"building the runtime takes {size / 2**20:.0f} MiB of disk space for a while, and {directory} has "
            f"{free / 2**20:.0f} MiB: {remedy}"
        )
