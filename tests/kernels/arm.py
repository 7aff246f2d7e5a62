"""Compile programs for 64-bit ARM with Debian's cross compiler, and run them under qemu.

llama.cpp is built once per patch, in the runtime's cache, for the baseline instruction set. A program for another one
links our kernels, compiled for that, in front of the library, whose own objects the linker then leaves out.
"""

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from d2q_edge.runtime import source
from tests.availability import unavailable
from tools import phone

CC, CXX = phone.CC, phone.CXX
BUILD_OPTIONS = (
    *phone.linux_options("armv8-a"),
    "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG",  # most code runs once, so that compiling takes longer
)
PROGRAM = "llama-simple"
"""The smallest program of llama.cpp; it needs no more than LIBRARIES."""
LIBRARIES = ("libllama.a", "libggml.a", "libggml-cpu.a", "libggml-base.a")
"""In the order that the linker needs."""
KERNELS = tuple(
    f"d2q-{name}.c" for name in ("cpu", "q8", "arm", "arm-gemm", "mul-mat", "repack", "repack-arm", "repack-x86")
)


@dataclass(frozen=True)
class Target:
    """An instruction set for the compiler, and a CPU of qemu that has it and, if possible, nothing newer."""

    march: str
    cpu: str


TARGETS = {
    "armv8.0": Target("armv8-a", "cortex-a53"),
    "dotprod": Target("armv8.2-a+dotprod+fp16", "neoverse-n1"),
    "i8mm": Target("armv8.2-a+dotprod+fp16+i8mm", "max"),
}


def qemu() -> str:
    """Find the emulator; skip the test, or fail it in CI, if it or the cross compiler is missing."""
    found = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if found is None:
        unavailable("qemu-aarch64 is missing (Debian: apt install qemu-user)")
    if shutil.which(CXX) is None:
        unavailable(f"{CXX} is missing (Debian: apt install g++-aarch64-linux-gnu)")
    return found


def run(program: Path, cpu: str, arguments: Sequence[str | Path] = ()) -> subprocess.CompletedProcess[str]:
    """Run a program on the emulated CPU."""
    return subprocess.run([qemu(), "-cpu", cpu, program, *arguments], capture_output=True, text=True, check=False)


def include_flags(tree: Path) -> list[str]:
    """Return compiler options for the headers of ggml and llama.cpp in a patched tree."""
    root = tree / "vendor/llama.cpp"
    folders = ("include", "ggml/include", "ggml/src", "ggml/src/ggml-cpu")
    return [f"-I{root / folder}" for folder in folders]


def build(tree: Path) -> Path:
    """Return the folder of LIBRARIES and PROGRAM; build them from the patched tree unless they are cached."""
    qemu()
    key = hashlib.sha256(repr((BUILD_OPTIONS, PROGRAM)).encode()).hexdigest()[:8]
    target = source.cache_directory() / f"{source.patch_hash()}-aarch64-{key}"
    if all((target / name).is_file() for name in (*LIBRARIES, PROGRAM)):
        return target
    target.mkdir(parents=True, exist_ok=True)
    log = target / "build.log"
    with tempfile.TemporaryDirectory(dir=target) as work:
        phone.configure(tree, Path(work), BUILD_OPTIONS, log)
        phone.compile_programs(Path(work), [PROGRAM], log)
        for name in LIBRARIES:
            next(Path(work).rglob(name)).replace(target / name)
        phone.collect(Path(work), [PROGRAM], target)
    return target


def link(tree: Path, program: Path, target: Target, folder: Path) -> Path:
    """Compile a C or C++ source and our kernels for `target`, link them with llama.cpp, and return the executable."""
    library = build(tree)
    flags = ["-O2", f"-march={target.march}", *include_flags(tree)]
    objects = []
    for path in (program, *(tree / source.OWN_SOURCES / name for name in KERNELS)):
        compiler = [CXX, "-std=c++17"] if path.suffix == ".cpp" else [CC, "-std=gnu11", "-D_GNU_SOURCE"]
        objects.append(folder / f"{path.stem}-{target.march}.o")
        subprocess.run([*compiler, *flags, "-c", path, "-o", objects[-1]], check=True)
    output = folder / f"{program.stem}-{target.march}"
    libraries = [library / name for name in LIBRARIES]
    subprocess.run([CXX, "-static", *objects, *libraries, "-lpthread", "-o", output], check=True)
    return output
