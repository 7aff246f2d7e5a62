"""The kernels' sources compiled here for several x86 targets, also with sanitizers, against the portable code."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

HARNESS = Path(__file__).with_name("kernels_harness.c")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")
# the portable code is the fallback; AVX2 has no byte dot product; the others differ in the instruction's encoding
TARGETS = {
    "portable": ("-march=x86-64",),
    "avx2": ("-march=haswell",),
    "avxvnni": ("-march=haswell", "-mavxvnni"),
    "avx512vnni": ("-march=cascadelake",),
    "native": ("-march=native",),
}
NEEDS = {"avx2": ("avx2", "fma", "f16c"), "avxvnni": ("avx_vnni",), "avx512vnni": ("avx512_vnni", "avx512vl")}

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="x86 targets"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc"),
]


def _cpu_flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def _build(tree: Path, output: Path, flags: tuple[str, ...]) -> None:
    ggml = tree / "vendor/llama.cpp/ggml"
    includes = [f"-I{ggml / part}" for part in ("include", "src", "src/ggml-cpu")]
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-Wno-unused-variable"]
    sources = [HARNESS, ggml / "src/d2q/d2q-quants.c", ggml / "src/d2q/d2q-encode.c"]
    subprocess.run(
        ["gcc", "-std=gnu11", "-D_GNU_SOURCE", *warnings, *flags, *includes, *sources, "-lm", "-o", output], check=True
    )


@pytest.mark.parametrize("sanitized", [False, True], ids=["optimized", "sanitized"])
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_agree_with_the_portable_ones(patched_tree: Path, tmp_path: Path, target: str, sanitized: bool) -> None:
    program = tmp_path / "harness"
    _build(patched_tree, program, (*TARGETS[target], "-O1" if sanitized else "-O3", *(SANITIZERS if sanitized else ())))
    if missing := set(NEEDS.get(target, ())) - _cpu_flags():
        pytest.skip(f"compiles; this CPU can't run it: no {', '.join(sorted(missing))}")
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith(" checks, 0 bad\n")
