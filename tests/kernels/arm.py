"""Programs for 64-bit ARM: compiled here with Debian's cross compiler, run under qemu.

Knows the instruction sets that the kernels distinguish and how llama.cpp is built for ARM, once per patch, in the
runtime's cache. llama.cpp itself is built for the plainest of them; a program for another one links our kernels,
compiled for it, in front of the library, whose own objects the linker then leaves out.
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
    "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG",  # most of the code runs once; compiling it is what takes time
)
PROGRAM = "llama-simple"
"""Of llama.cpp's own programs the smallest; it needs no more than LIBRARIES."""
LIBRARIES = ("libllama.a", "libggml.a", "libggml-cpu.a", "libggml-base.a")
"""In the order in which the linker wants them."""
KERNELS = ("d2q-cpu.c", "d2q-q8.c", "d2q-arm.c", "d2q-arm-gemm.c", "d2q-mul-mat.c")


@dataclass(frozen=True)
class Target:
    """An instruction set for the compiler, and a CPU of qemu that has it and, where there is one, nothing newer."""

    march: str
    cpu: str


TARGETS = {
    "armv8.0": Target("armv8-a", "cortex-a53"),
    "dotprod": Target("armv8.2-a+dotprod+fp16", "neoverse-n1"),
    "i8mm": Target("armv8.2-a+dotprod+fp16+i8mm", "max"),
}


def qemu() -> str:
    """The emulator; skips, or in CI fails, where it or the cross compiler is missing."""
    found = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if found is None:
        unavailable("qemu-aarch64 is missing (Debian: apt install qemu-user)")
    if shutil.which(CXX) is None:
        unavailable(f"{CXX} is missing (Debian: apt install g++-aarch64-linux-gnu)")
    return found


def run(program: Path, cpu: str, arguments: Sequence[str | Path] = ()) -> subprocess.CompletedProcess[str]:
    """The program's result on the emulated CPU."""
    return subprocess.run([qemu(), "-cpu", cpu, program, *arguments], capture_output=True, text=True, check=False)


def include_flags(tree: Path) -> list[str]:
    """Where ggml's and llama.cpp's headers are in a patched tree."""
    root = tree / "vendor/llama.cpp"
    folders = ("include", "ggml/include", "ggml/src", "ggml/src/ggml-cpu")
    return [f"-I{root / folder}" for folder in folders]


def build(tree: Path) -> Path:
    """The folder with LIBRARIES and PROGRAM, from the cache or built by tools/phone.py from the patched tree."""
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
    """Compile the C or C++ source `program` and our kernels for `target`, link them with llama.cpp; the executable."""
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
