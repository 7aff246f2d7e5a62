"""Build the patched llama.cpp for a phone: Android with the NDK, or plain 64-bit ARM Linux with Debian's compiler.

`python tools/phone.py android --ndk DIR` makes one folder for all 64-bit Android phones, with the CPU backend for each
group of phones, and the library loads the fastest that the phone can run. `python tools/phone.py linux` makes static
programs for one instruction set. docs/phone.md says what to do with the folder.

The NDK has its own toolchain file; the options are those of its documentation
(https://developer.android.com/ndk/guides/cmake) and of llama.cpp's docs/android.md.
"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

from d2q_edge.errors import D2QError
from d2q_edge.runtime import source
from d2q_edge.runtime.process import run_logged, say
from d2q_edge.utils.machine import usable_cpus

PROGRAMS = ("llama-completion", "llama-bench", "llama-simple")
"""Completion and chat with all options; the benchmark; the smallest program that generates text."""
CC, CXX = "aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++"
LINUX_MARCH = "armv8.2-a+dotprod"
"""Cortex-A55, A75 (2018) and later have dotprod. Cortex-A53 and A73 need armv8-a; armv8.6-a+i8mm is faster where there
is i8mm (Cortex-A510, A710 and later, 2022)."""
ANDROID_API = 28
"""Android 9, the oldest that llama.cpp's own build supports."""
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=OFF",  # this machine's CPU isn't the phone's
    "-DGGML_OPENMP=OFF",  # ggml's own threads suffice, and need no library of the NDK
    "-DGGML_LLAMAFILE=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_COMMON=ON",
    "-DLLAMA_BUILD_TOOLS=ON",
    "-DLLAMA_BUILD_EXAMPLES=ON",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_APP=OFF",
)


def linux_options(march: str) -> list[str]:
    """Return CMake's options for static programs of one instruction set, as named by gcc's -march."""
    return [
        *OPTIONS,
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_C_COMPILER={CC}",
        f"-DCMAKE_CXX_COMPILER={CXX}",
        "-DBUILD_SHARED_LIBS=OFF",
        "-DCMAKE_EXE_LINKER_FLAGS=-static -s",  # without symbols
        f"-DGGML_CPU_ARM_ARCH={march}",
    ]


def android_options(ndk: Path, api: int) -> list[str]:
    """Return CMake's options for programs and libraries for all 64-bit ARM phones from an API level on.

    Raises:
        D2QError: there is no NDK in that directory.
    """
    toolchain = ndk / "build/cmake/android.toolchain.cmake"
    if not toolchain.is_file():
        raise D2QError(f"{ndk} isn't an Android NDK: it has no build/cmake/android.toolchain.cmake")
    return [
        *OPTIONS,
        f"-DCMAKE_TOOLCHAIN_FILE={toolchain.resolve()}",
        "-DANDROID_ABI=arm64-v8a",
        f"-DANDROID_PLATFORM=android-{api}",
        "-DANDROID_STL=c++_shared",  # several shared libraries must have one C++ runtime
        "-DANDROID_SUPPORT_FLEXIBLE_PAGE_SIZES=ON",  # pages of 16 KiB; NDK r28 and later do so anyway
        "-DBUILD_SHARED_LIBS=ON",
        "-DGGML_BACKEND_DL=ON",
        "-DGGML_CPU_ALL_VARIANTS=ON",
        "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",
    ]


def cpp_runtime(ndk: Path) -> Path:
    """Return the NDK's shared C++ runtime for 64-bit ARM, which Android lacks.

    Raises:
        D2QError: this NDK has none.
    """
    found = sorted(ndk.glob("toolchains/llvm/prebuilt/*/sysroot/usr/lib/aarch64-linux-android/libc++_shared.so"))
    if not found:
        raise D2QError(f"the NDK in {ndk} has no libc++_shared.so for aarch64-linux-android; use r23 or later")
    return found[0]


def configure(tree: Path, build: Path, options: Sequence[str], log: Path) -> None:
    """Configure the llama.cpp of a patched tree.

    Raises:
        D2QError: CMake is missing or fails.
    """
    generator = ("-G", "Ninja") if shutil.which("ninja") else ()
    command: list[str | Path] = ["cmake", *generator, "-S", tree / "vendor/llama.cpp", "-B", build, *options]
    run_logged(command, log, "configuring llama.cpp for the phone failed")


def compile_programs(build: Path, programs: Sequence[str], log: Path) -> None:
    """Compile programs, and what they need, into the bin/ of a configured folder.

    Raises:
        D2QError: the compiler fails, or there is no such program.
    """
    command: list[str | Path] = ["cmake", "--build", build, "--parallel", str(usable_cpus()), "--target", *programs]
    run_logged(command, log, "building llama.cpp for the phone failed", description="Building for the phone")


def collect(build: Path, programs: Sequence[str], out: Path) -> list[Path]:
    """Copy the programs and the shared libraries of a build folder; return the files in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    for path in (build / "bin").iterdir():
        # Links to versioned libraries become files: adb push doesn't keep links.
        if path.name in programs or ".so" in path.name:
            shutil.copy2(path, out / path.name)
    return sorted(out.iterdir())


def build_for(options: Sequence[str], programs: Sequence[str], out: Path) -> list[Path]:
    """Patch, configure, compile and collect; return the files in `out`. The log is beside it.

    Raises:
        D2QError: the source can't be fetched, or a step fails.
    """
    out.mkdir(parents=True, exist_ok=True)
    log = out.parent / f"{out.name}.log"
    log.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}-work-") as work:
        tree, build = Path(work) / "source", Path(work) / "build"
        source.prepare(tree, log)
        configure(tree, build, options, log)
        say(f"Building {', '.join(programs)}, which takes several minutes (log: {log})")
        compile_programs(build, programs, log)
        return collect(build, programs, out)


@click.group()
def main() -> None:
    """Build the patched llama.cpp for a phone."""


_out = click.option("--out", type=click.Path(path_type=Path), default=Path("phone"), show_default=True, help="Folder.")
_programs = click.option(
    "--program", "programs", multiple=True, default=PROGRAMS, show_default=True, help="Of llama.cpp; can be repeated."
)


@main.command()
@click.option("--ndk", type=click.Path(path_type=Path), envvar="ANDROID_NDK", required=True, help="Or in $ANDROID_NDK.")
@click.option(
    "--api", type=click.IntRange(21), default=ANDROID_API, show_default=True, help="Lowest Android API level."
)
@_programs
@_out
def android(ndk: Path, api: int, programs: tuple[str, ...], out: Path) -> None:
    """For Android, with the NDK."""
    try:
        options, runtime = android_options(ndk, api), cpp_runtime(ndk)
        build_for(options, programs, out)
        shutil.copy2(runtime, out / runtime.name)
    except D2QError as error:
        raise click.ClickException(str(error)) from error
    click.echo("\n".join(str(path) for path in sorted(out.iterdir())))


@main.command()
@click.option("--march", default=LINUX_MARCH, show_default=True, help="Instruction set, as gcc's -march names it.")
@_programs
@_out
def linux(march: str, programs: tuple[str, ...], out: Path) -> None:
    """For 64-bit ARM Linux, with Debian's g++-aarch64-linux-gnu: static programs."""
    try:
        if shutil.which(CXX) is None:
            raise D2QError(f"{CXX} is missing (Debian, Ubuntu: apt install g++-aarch64-linux-gnu)")
        files = build_for(linux_options(march), programs, out)
    except D2QError as error:
        raise click.ClickException(str(error)) from error
    click.echo("\n".join(map(str, files)))


if __name__ == "__main__":
    main()
