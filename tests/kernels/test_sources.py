"""The kernels, compiled for x86 and ARM targets and with sanitizers, against exact sums and portable code.

Also compiles all our sources for each target of llama.cpp's dispatching builds.
"""

import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from d2q_edge.runtime import source
from tests.kernels import arm

HARNESS = Path(__file__).with_name("kernels_harness.c")
TILED_HARNESS = Path(__file__).with_name("tiled_harness.cpp")
SOURCES = ("quants", "encode", "cpu", "q8", "x86", "arm", "arm-gemm", "mul-mat", "repack", "repack-x86", "repack-arm")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")
# portable: the fallback; AVX2 and AVX-512 alone: no byte dot product; with it, AVX-VNNI and AVX512-VNNI differ in its
# encoding; AVX512-VBMI has look-ups of its own
TARGETS = {
    "portable": ("-march=x86-64",),
    "avx2": ("-march=haswell",),
    "avxvnni": ("-march=haswell", "-mavxvnni"),
    "avx512": ("-march=skylake-avx512",),
    "avx512vnni": ("-march=cascadelake",),
    "avx512vbmi": ("-march=icelake-server",),
    "native": ("-march=native",),
}
# tiled.cpp has no kernel of its own for AVX-VNNI; for AVX without AVX2 our blocks go through the stock kernel
TILED_TARGETS = {
    "avx": ("-march=ivybridge",),
    **{name: TARGETS[name] for name in ("avx2", "avxvnni", "avx512vnni", "avx512vbmi", "native")},
}
# without their runtime libraries, which don't run under qemu: undefined behavior traps
TRAPS = ("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")
NEEDS = {
    "avx": ("avx", "f16c"),
    "avx2": ("avx2", "fma", "f16c"),
    "avxvnni": ("avx_vnni",),
    "avx512": ("avx512dq", "avx512vl"),
    "avx512vnni": ("avx512_vnni", "avx512vl"),
    "avx512vbmi": ("avx512_vnni", "avx512vbmi"),
}

# compiler options of ggml's CPU features, where they aren't named like the feature
OPTIONS = {
    "SSE42": ("-msse4.2",),
    "AVX512": ("-mavx512f", "-mavx512cd", "-mavx512vl", "-mavx512dq", "-mavx512bw"),
    "AMX_TILE": ("-mamx-tile",),
    "AMX_INT8": ("-mamx-int8",),
}
# tiled.cpp's use of d2q-tiled.h
TILED_USE = """
#include "d2q/d2q-tiled-x8.h"
void use(const block_d2q2 * a, const block_d2q3 * b, tiled_tile_src0 * t, tiled_tile_src1 * u, float * out) {
    tiled_unpack_src0(a, 1, 16, t, 1);
    tiled_unpack_src0(b, 1, 16, t, 1);
    tiled_run_microtile<D2Q_TILED_ARGUMENTS>(*t, *u, 0, 0, 1, 0, out, TILED_TILE_ROWS);
}
"""

x86_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="x86 targets")
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")


def _cpu_flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def _c(compiler: str, tree: Path, flags: Sequence[str]) -> list[str]:
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-Wno-unused-variable"]
    return [compiler, "-std=gnu11", "-D_GNU_SOURCE", *warnings, *flags, *arm.include_flags(tree)]


def _build(compiler: str, tree: Path, output: Path, flags: Sequence[str]) -> None:
    own = [tree / source.OWN_SOURCES / f"d2q-{name}.c" for name in SOURCES]
    subprocess.run([*_c(compiler, tree, flags), HARNESS, *own, "-lm", "-o", output], check=True)


def _build_tiled(tree: Path, output: Path, flags: Sequence[str]) -> None:
    names = "quants", "encode", "cpu", "q8", "x86", "repack", "repack-x86"
    own = [tree / source.OWN_SOURCES / f"d2q-{name}.c" for name in names]
    subprocess.run([*_c("gcc", tree, flags), "-c", *own], check=True, cwd=output.parent)
    objects = [output.parent / path.with_suffix(".o").name for path in own]
    stock = tree / "vendor/llama.cpp/ggml/src/ggml-cpu/tiled/tiled-kernel.cpp"
    # ggml's own code has warnings
    command = ["g++", "-std=gnu++17", "-D_GNU_SOURCE", "-w", *flags, *arm.include_flags(tree)]
    subprocess.run([*command, TILED_HARNESS, stock, *objects, "-o", output], check=True)


def _check(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith(" checks, 0 bad\n")


@x86_only
@needs_gcc
@pytest.mark.parametrize("sanitized", [False, True], ids=["optimized", "sanitized"])
@pytest.mark.parametrize("target", TARGETS)
def test_x86_kernels(patched_tree: Path, tmp_path: Path, target: str, sanitized: bool) -> None:
    program = tmp_path / "harness"
    _build(
        "gcc",
        patched_tree,
        program,
        (*TARGETS[target], "-O1" if sanitized else "-O3", *(SANITIZERS if sanitized else ())),
    )
    if missing := set(NEEDS.get(target, ())) - _cpu_flags():
        pytest.skip(f"compiles; this CPU can't run it: no {', '.join(sorted(missing))}")
    _check(subprocess.run([program], capture_output=True, text=True, check=False))


@x86_only
@needs_gcc
@pytest.mark.parametrize(
    ("target", "sanitized"),
    [*((name, False) for name in TILED_TARGETS), ("avx2", True), ("avx512vnni", True)],  # tiled.cpp takes its time
)
def test_tiled_multiplication(patched_tree: Path, tmp_path: Path, target: str, sanitized: bool) -> None:
    program = tmp_path / "harness"
    _build_tiled(patched_tree, program, (*TILED_TARGETS[target], "-O1", *(SANITIZERS if sanitized else ())))
    if missing := set(NEEDS.get(target, ())) - _cpu_flags():
        pytest.skip(f"compiles; this CPU can't run it: no {', '.join(sorted(missing))}")
    _check(subprocess.run([program], capture_output=True, text=True, check=False))


@pytest.mark.parametrize("sanitized", [False, True], ids=["optimized", "sanitized"])
@pytest.mark.parametrize("name", arm.TARGETS)
def test_arm_kernels(patched_tree: Path, tmp_path: Path, name: str, sanitized: bool) -> None:
    arm.qemu()
    target, program = arm.TARGETS[name], tmp_path / "harness"
    optimization = ("-O1", *TRAPS) if sanitized else ("-O3",)
    _build(arm.CC, patched_tree, program, ("-static", f"-march={target.march}", *optimization))
    _check(arm.run(program, target.cpu))


@x86_only
@needs_gcc
def test_every_cpu_backend_of_a_dispatching_build_compiles(patched_tree: Path, tmp_path: Path) -> None:
    """GGML_CPU_ALL_VARIANTS for our sources only: the whole build takes half an hour on two cores."""
    cmake = (patched_tree / "vendor/llama.cpp/ggml/src/CMakeLists.txt").read_text()
    x86 = cmake[cmake.index('GGML_SYSTEM_ARCH STREQUAL "x86"') :].split("elseif(GGML_SYSTEM_ARCH STREQUAL", 1)[0]
    variants = dict(re.findall(r"^\s*ggml_add_cpu_backend_variant\((\w+)([^)]*)\)", x86, re.MULTILINE))
    assert {"x64", "ivybridge", "haswell", "skylakex", "zen4", "alderlake", "sapphirerapids"} <= set(variants)
    names = ("cpu", "q8", "x86", "mul-mat", "repack", "repack-x86")
    own = [patched_tree / source.OWN_SOURCES / f"d2q-{name}.c" for name in names]
    use = tmp_path / "use.cpp"
    use.write_text(TILED_USE)
    for features in variants.values():
        flags = ["-O0", "-march=x86-64"]
        for name in features.split():
            flags += OPTIONS.get(name, ("-m" + name.lower().replace("_", ""),))
        subprocess.run([*_c("gcc", patched_tree, flags), "-S", *own], check=True, cwd=tmp_path)
        command = ["g++", "-std=gnu++17", "-w", *flags, *arm.include_flags(patched_tree), "-S", str(use)]
        subprocess.run(command, check=True, cwd=tmp_path)


def test_every_source_is_compiled(patched_tree: Path) -> None:
    assert {f"d2q-{name}.c" for name in SOURCES} == {
        path.name for path in (patched_tree / source.OWN_SOURCES).glob("*.c")
    }
