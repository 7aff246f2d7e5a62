"""llama.cpp's own tests of ggml, from the patched tree, on the installed runtime's CPU backend."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from d2q_edge.formats.tensor_types import ALL, TensorType
from d2q_edge.runtime.installed import library_directory
from tests.availability import unavailable
from tests.kernels.ggml import Ggml

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def _program(name: str, tree: Path, work: Path) -> Path:
    directory = library_directory()
    if directory is None:
        unavailable("the patched runtime is not installed: run `d2q-edge runtime install`")
    llama = tree / "vendor/llama.cpp"
    includes = [f"-I{llama / 'ggml/include'}", f"-I{llama / 'ggml/src'}"]
    link = [f"-L{directory}", "-lggml", "-lggml-cpu", "-lggml-base", f"-Wl,-rpath,{directory}", "-pthread"]
    source = llama / "tests" / f"{name}.cpp"
    subprocess.run(["g++", "-std=c++17", "-w", *includes, source, "-o", work / name, *link], check=True)
    return work / name


def _run(program: Path, *arguments: str) -> str:
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_quantize_fns(ggml: Ggml, patched_tree: Path, tmp_path: Path) -> None:
    """Encoders and dot products stay within llama.cpp's error bounds for 2 and 3 bits."""
    del ggml
    output = _run(_program("test-quantize-fns", patched_tree, tmp_path), "-v")
    assert output.endswith("0 tests failed\n")
    for t in ALL:
        lines = re.findall(rf"^ *{t.name} (.*?): +ok ", output, re.MULTILINE)
        assert lines == ["absolute quantization error", "reference implementation error", "dot product error"]


def test_quantize_perf_runs(ggml: Ggml, patched_tree: Path, tmp_path: Path) -> None:
    del ggml
    program = _program("test-quantize-perf", patched_tree, tmp_path)
    types = [argument for t in ALL for argument in ("--type", t.name)]
    output = _run(program, "--size", "4096", "--iterations", "2", *types)
    assert re.findall(r"^(\w+)$", output, re.MULTILINE) == [t.name for t in ALL]
    assert output.count("vec_dot_q") == len(ALL)


OPERATIONS = ("MUL_MAT", "MUL_MAT_ID", "GET_ROWS", "CPY")


@pytest.fixture(scope="module")
def backend_ops(ggml: Ggml, patched_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Run test-backend-ops, which compares the CPU backend with its reference implementation, and return its output.

    Once for all operations, because it takes most of its time to list its cases.
    """
    del ggml
    program = _program("test-backend-ops", patched_tree, tmp_path_factory.mktemp("ops"))
    output = _run(program, "test", "-b", "CPU", "-o", ",".join(OPERATIONS), "-p", "=d2q")
    return re.sub(r"\x1b\[[\d;]*m", "", output)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("t", ALL, ids=lambda t: t.name)
def test_backend_ops(backend_ops: str, t: TensorType, operation: str) -> None:
    results = re.findall(rf"^ *{operation}\([^\n]*={t.name},[^\n]*\): (.*)$", backend_ops, re.MULTILINE)
    assert len(results) >= 3
    assert set(results) == {"OK"}
