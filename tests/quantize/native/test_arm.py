"""The C kernels on an emulated ARM CPU, compared with this machine's."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from d2q_edge.formats.tensor_types import D2Q2_64, D2Q3_64, TensorType
from d2q_edge.quantize import native
from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.feedback import diagonal_blocks, invert_code_blocks
from d2q_edge.quantize.native import library
from tests.kernels import arm
from tests.quantize.block_of_columns import Block

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reads the struct, levels, ranks, ends and factors of the steps, weights, U, P and inverses; writes what
    quantize_block returns."""
    arm.qemu()
    output = tmp_path_factory.mktemp("arm") / "run_quantize_block"
    flags = [flag for flag in library.FLAGS if flag not in (library.NATIVE, "-shared", "-fPIC")]
    sources = [Path(__file__).with_name("run_quantize_block.c"), *sorted(library.SOURCES.glob("*.c"))]
    warnings = ["-Wall", "-Wextra", "-Werror"]
    options = [*flags, *warnings, "-march=armv8-a", f"-I{library.SOURCES}", "-static", "-o", str(output)]
    subprocess.run([arm.CC, *options, *map(str, sources), "-lm"], check=True)
    return output


@pytest.mark.parametrize("kind", [D2Q2_64, D2Q3_64], ids=lambda kind: kind.name)
def test_quantize_block(kind: TensorType, program: Path, tmp_path: Path) -> None:
    rows, search = 21, CodebookSearch(kind)
    block = Block.make(kind, rows)
    arguments = block.weights, block.U, block.P, invert_code_blocks(diagonal_blocks(block.U), search.levels.shape[2])
    expected = native.quantize_block(search, *arguments)
    tables = search.native_tables
    levels, ranks, steps, ends = tables._arrays
    arrays = [levels, ranks, ends, steps, *(each.contiguous().numpy() for each in arguments)]
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_bytes(bytes(tables._struct) + b"".join(array.tobytes() for array in arrays))
    result = arm.run(program, "cortex-a53", [source, target, str(rows)])
    assert result.returncode == 0, result.stderr
    data, same = target.read_bytes(), np.ones(rows, bool)
    for tensor in expected:
        array = tensor.numpy().reshape(rows, -1)
        found = np.frombuffer(data, array.dtype, array.size).reshape(array.shape)
        data = data[array.nbytes :]
        same &= np.isclose(found, array, rtol=1e-3, atol=1e-3 * np.abs(array).max(1, keepdims=True)).all(1)
    assert not data
    # A near tie is decided otherwise now and then, and the rest of that row follows.
    assert same.mean() > 0.85
