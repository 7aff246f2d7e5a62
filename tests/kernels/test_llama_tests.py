"""llama.cpp's own test programs of ggml, from the patched tree, on the installed runtime's CPU backend."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from d2q_edge.runtime.installed import library_directory
from d2q_edge.tensor_types import ALL, TensorType
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
    """Errors of every type's reference encoder and dot product, within llama.cpp's bounds for 2 and 3 bits."""
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


@pytest.fixture(scope="module")
def backend_ops(ggml: Ggml, patched_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    del ggml
    return _program("test-backend-ops", patched_tree, tmp_path_factory.mktemp("ops"))


@pytest.mark.parametrize("operation", ["MUL_MAT", "MUL_MAT_ID", "GET_ROWS", "CPY"])
@pytest.mark.parametrize("t", ALL, ids=lambda t: t.name)
def test_backend_ops(backend_ops: Path, t: TensorType, operation: str) -> None:
    """The CPU backend as it computes, against its reference implementation."""
    output = _run(backend_ops, "test", "-b", "CPU", "-o", operation, "-p", rf"={t.name}[,\)]")
    output = re.sub(r"\x1b\[[\d;]*m", "", output)
    passed = re.search(r"(\d+)/(\d+) tests passed", output)
    assert passed is not None and passed[1] == passed[2] and int(passed[1]) > 0
    assert re.search(rf"{operation}\([^\n]*={t.name}[^\n]*: OK", output)
    assert "not supported" not in output
