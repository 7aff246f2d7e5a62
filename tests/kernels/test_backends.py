"""Backends without kernels for our types leave them to the CPU. ggml declines for them, so no GPU is needed here."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from d2q_edge.runtime.installed import library_directory
from tests.availability import unavailable
from tests.kernels.ggml import Ggml

HARNESS = Path(__file__).with_name("backends_harness.cpp")
HAVE = {"CPU", "MTL", "BLAS"}


@pytest.fixture(scope="module")
def backend_names(patched_tree: Path) -> set[str]:
    """Collect the names under which the tree's backends register."""
    ggml = patched_tree / "vendor/llama.cpp/ggml"
    sources = [
        p for p in (*ggml.glob("include/*.h"), *ggml.glob("src/ggml-*/*")) if p.suffix in {".h", ".hpp", ".cpp", ".cu"}
    ]
    text = "\n".join(path.read_text(errors="replace") for path in sorted(sources))
    defined = re.findall(r'#define GGML_(?!CUBLAS)\w+_NAME\s+"([\w-]+)"', text)
    literal = re.findall(r'_reg_get_name\([^)]*\)\s*\{[^}]*?return "(\w+)"', text)
    return {*defined, *literal, "RPC"}  # RPC's name is one of its servers'


def test_only_backends_with_kernels_are_asked(
    ggml: Ggml, patched_tree: Path, backend_names: set[str], tmp_path: Path
) -> None:
    assert backend_names >= {*HAVE, "CUDA", "ROCm", "MUSA", "Vulkan", "SYCL", "OpenCL", "CANN", "WebGPU", "RPC"}
    directory = library_directory()
    if directory is None or shutil.which("g++") is None:
        unavailable("needs the installed runtime and g++")
    program = tmp_path / "backends"
    source = patched_tree / "vendor/llama.cpp/ggml"
    flags = ["-std=c++17", "-Wall", "-Werror", f"-I{source / 'include'}", f"-I{source / 'src'}"]
    link = [f"-L{directory}", "-lggml-base", f"-Wl,-rpath,{directory}"]
    subprocess.run(["g++", *flags, HARNESS, "-o", program, *link], check=True)
    names = sorted(backend_names)
    lines = subprocess.run([program, *names], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == [f"{name} 1 " + " ".join(["11" if name in HAVE else "00"] * 4) for name in names]


def test_nobody_asks_a_device_directly(patched_tree: Path) -> None:
    """Nothing bypasses ggml_backend_dev_supports_op but virtgpu's server, which answers for a guest."""
    src = patched_tree / "vendor/llama.cpp"
    files = [
        p
        for d in ("ggml/src", "src", "common")
        for p in (src / d).rglob("*")
        if p.suffix in {".c", ".cpp", ".m", ".cu", ".h"}
    ]
    direct = {
        p.relative_to(src).as_posix()
        for p in files
        if re.search(r"iface\.supports_op\(", p.read_text(errors="replace"))
    }
    assert direct == {
        "ggml/src/ggml-backend.cpp",
        "ggml/src/ggml-virtgpu/backend/backend-dispatched-backend.cpp",
        "ggml/src/ggml-virtgpu/backend/backend-dispatched-device.cpp",
    }
