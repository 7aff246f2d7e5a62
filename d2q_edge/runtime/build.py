"""Build the patched llama-cpp-python and llama.cpp's tools, keep them in the cache, install the wheel.

Knows pip, CMake and the cache's layout. Does not know what is patched (source.py). A wheel or a folder of tools appears
in the cache complete or not at all: both are made beside their place and renamed.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from d2q_edge.errors import D2QError
from d2q_edge.runtime import source
from d2q_edge.runtime.installed import (
    TOOLS,
    RuntimeInfo,
    info,
    installed_key,
    installed_version,
    library_directory,
    tool_in,
)
from d2q_edge.runtime.process import run_logged, say
from d2q_edge.utils.machine import cache_key, usable_cpus

WHEEL_OPTIONS = ("-DLLAVA_BUILD=OFF", "-DLLAMA_BUILD_COMMON=OFF", "-DGGML_NATIVE=ON")
"""The package imports mtmd (images) only when it is asked to, and never uses llama.cpp's common library."""
TOOL_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DLLAVA_BUILD=OFF",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_BUILD_COMMON=ON",
    "-DLLAMA_BUILD_TOOLS=ON",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",
)
MINIMUM_CMAKE = (3, 21)


def _path() -> str:
    """PATH with the environment's own programs first: cmake and ninja may have been installed by pip."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def _which(*names: str) -> str | None:
    return next((found for name in names if (found := shutil.which(name, path=_path()))), None)


def check_programs() -> None:
    """Make sure that what a build needs is there.

    Raises:
        D2QError: names what is missing and how Debian and Ubuntu call it.
    """
    needed = {
        "a C compiler": ("build-essential", _which("cc", "gcc", "clang")),
        "a C++ compiler": ("build-essential", _which("c++", "g++", "clang++")),
        "make or ninja": ("build-essential", _which("ninja", "make")),
        "patch": ("patch", _which("patch")),
        "cmake": ("cmake", _which("cmake")),
    }
    missing = [name for name, (_, found) in needed.items() if not found]
    if missing:
        packages = " ".join(sorted({needed[name][0] for name in missing}))
        raise D2QError(
            f"to build the runtime, install {', '.join(missing)} first (Debian, Ubuntu: apt install {packages})"
        )
    output = subprocess.run(
        [needed["cmake"][1] or "cmake", "--version"], capture_output=True, text=True, check=False
    ).stdout
    version = re.search(r"(\d+)\.(\d+)", output)
    if version is None or (int(version[1]), int(version[2])) < MINIMUM_CMAKE:
        found = output.split("\n")[0].strip() or "an unknown version"
        raise D2QError(f"the runtime needs CMake 3.21 or newer, not {found}: pip install cmake")
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False).returncode:
        raise D2QError(f"this Python has no pip: run {sys.executable} -m ensurepip")


def _user_options() -> list[str]:
    """The words of CMAKE_ARGS, taken apart as scikit-build-core does for the wheel: as a shell would.

    Raises:
        D2QError: a quote is not closed.
    """
    try:
        return shlex.split(os.environ.get("CMAKE_ARGS", ""))
    except ValueError as error:
        raise D2QError(f"CMAKE_ARGS can't be split into words ({error}): {os.environ['CMAKE_ARGS']}") from error


def _environment(options: Sequence[str]) -> dict[str, str]:
    """Variables for pip, scikit-build-core and CMake; what the user put into CMAKE_ARGS comes last and wins."""
    variables = {
        "PATH": _path(),
        "CMAKE_BUILD_PARALLEL_LEVEL": str(usable_cpus()),
        "CMAKE_ARGS": " ".join([*options, os.environ.get("CMAKE_ARGS", "")]).strip(),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    if _which("ninja") and "CMAKE_GENERATOR" not in os.environ:
        variables["CMAKE_GENERATOR"] = "Ninja"
    return variables


class _Build:
    """A patched tree and a build folder that wheel and tools share, so that common objects are compiled once."""

    def __init__(self, work: Path, log: Path) -> None:
        self.tree = work / "source"
        self.folder = work / "build"
        self.log = log

    def prepare(self) -> None:
        if not self.tree.exists():
            source.prepare(self.tree, self.log)

    def wheel(self, target: Path) -> None:
        """Build the wheel and rename it to `target`."""
        self.prepare()
        say(f"Building the runtime on {usable_cpus()} cores, which takes a few minutes (log: {self.log})")
        out = self.tree.parent / "wheel"
        run_logged(
            [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--wheel-dir", out, self.tree],
            self.log,
            "building the runtime failed",
            env=_environment(WHEEL_OPTIONS) | {"SKBUILD_BUILD_DIR": str(self.folder)},
        )
        wheels = list(out.glob("*.whl"))
        if len(wheels) != 1:
            raise D2QError(f"building the runtime made {len(wheels)} wheels instead of one; see {self.log}")
        target.mkdir(parents=True, exist_ok=True)
        wheels[0].replace(target / wheels[0].name)

    def tools(self, target: Path, user_options: Sequence[str]) -> None:
        """Build the tools and put them with their libraries into `target`; the user's options come last and win."""
        self.prepare()
        say(f"Building {', '.join(TOOLS)} (log: {self.log})")
        env = _environment(())
        # a folder configured for the wheel keeps its settings, these are added
        run_logged(
            ["cmake", "-S", self.tree, "-B", self.folder, *TOOL_OPTIONS, *user_options],
            self.log,
            "configuring llama.cpp's tools failed",
            env=env,
        )
        run_logged(
            ["cmake", "--build", self.folder, "--parallel", str(usable_cpus()), "--target", *TOOLS],
            self.log,
            "building llama.cpp's tools failed",
            env=env,
        )
        out = self.tree.parent / "tools"
        out.mkdir()
        for path in (self.folder / "bin").iterdir():
            if path.stem in TOOLS or ".so" in path.name or path.suffix in (".dylib", ".dll"):
                shutil.copy2(path, out / path.name, follow_symlinks=False)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            shutil.rmtree(target)
        out.rename(target)


def _pip_install(wheel: Path, log: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    failure = f"installing {wheel.name} failed"
    run_logged([*pip, "--force-reinstall", "--no-deps", wheel], log, failure)
    run_logged([*pip, wheel], log, failure)  # its dependencies, where they are missing


def _up_to_date(key: str) -> bool:
    """Whether what is installed is the wheel of this key.

    Where a wheel came from isn't always known (installed_key). Then the patch decides, as long as nobody asks for
    options: a reinstallation would be in vain more often than not.
    """
    if installed_version() != source.runtime_version() or library_directory() is None:
        return False
    known = installed_key()
    return known == key if known else not os.environ.get("CMAKE_ARGS")


def install(tools: bool = False) -> RuntimeInfo:
    """Install the patched llama-cpp-python into the running environment; build what the cache lacks.

    Args:
        tools: also build llama.cpp's command-line tools (TOOLS) from the same tree.

    Returns:
        What is installed afterwards.

    Raises:
        D2QError: a program is missing, there is no network, CMAKE_ARGS has an open quote, or a build step failed; the
            cache stays consistent.
    """
    started = time.monotonic()
    version, user_options = source.runtime_version(), _user_options()
    key = cache_key(source.patch_hash())
    place = source.cache_directory() / key
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise D2QError(f"the cache folder {place} can't be created ({error.strerror}); set XDG_CACHE_HOME") from error
    log = place / "build.log"
    wheels = list((place / "wheel").glob("*.whl"))
    missing_tools = tools and not all(tool_in(place / "tools", name) for name in TOOLS)
    if not wheels or missing_tools:
        check_programs()
        log.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(dir=place, prefix="work-", ignore_cleanup_errors=True) as work:
            build = _Build(Path(work), log)
            if not wheels:
                build.wheel(place / "wheel")
            if missing_tools:
                build.tools(place / "tools", user_options)
        wheels = list((place / "wheel").glob("*.whl"))
    if _up_to_date(key):
        say(f"llama-cpp-python {version} is already installed")
    else:
        _pip_install(wheels[0], log)
    say(f"The runtime is ready: llama-cpp-python {version} ({time.monotonic() - started:.0f} s)")
    return info()
