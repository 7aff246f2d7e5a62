"""Modeled cycles of the ARM kernels: how they are counted, and that ours need fewer than those they replace."""

import shutil
from pathlib import Path

import pytest

from d2q_edge.errors import D2QError
from tests.availability import unavailable
from tests.kernels import arm
from tools import mca

ASSEMBLY = """
other:
\tsdot\tv0.4s, v1.16b, v2.16b
\t.size\tother, .-other
dot:
\tcbz\tw0, .L9
.L1:
\tmov\tw3, 4
.L2:
\tldr\tq1, [x0]
\tsdot\tv0.4s, v1.16b, v2.16b
\tsdot\tv0.4s, v1.16b, v2.4b[1]
\tsubs\tw3, w3, #1
\tbne\t.L2
.L3:
\tadd\tx1, x1, :lo12:table
\tsmmla\tv0.4s, v1.16b, v2.16b
\tcbnz\tw1, .L3
\tb\t.L1
.L4:
\tadd\tx1, x1, 1
\tb.lt\t.L4
.L9:
\tret
\t.size\tdot, .-dot
"""


def test_loops_are_found_and_their_weights_counted() -> None:
    first, second = mca.innermost_loops(ASSEMBLY, "dot")
    assert (first.weights, len(first.lines)) == (32, 5)
    assert (second.weights, len(second.lines)) == (32, 3)
    assert second.lines == ["\tadd\tx1, x1, 0", "\tsmmla\tv0.4s, v1.16b, v2.16b", "\tcbnz\tw1, 0"]
    for name in ("other", "missing"):
        with pytest.raises(D2QError, match="no loop with dot products"):
            mca.innermost_loops(ASSEMBLY, name)


def test_ours_need_fewer_cycles(patched_tree: Path, tmp_path: Path) -> None:
    arm.qemu()
    if shutil.which("llvm-mca") is None:
        unavailable("llvm-mca is missing (Debian: apt install llvm)")
    for cpu, cycles in mca.measure(patched_tree, tmp_path, "llvm-mca").items():
        assert cycles["d2q2"] < cycles["q2_K"], cpu
        assert cycles["d2q3"] < cycles["q3_K"], cpu
        assert cycles["d2q2 x8"] < 0.8 * cycles["d2q2"], cpu
        assert cycles["d2q3 x8"] < 0.95 * cycles["d2q3"], cpu
        for name in ("d2q2_64", "d2q3_64"):
            assert cycles[f"{name} x8"] < 0.95 * cycles[name], cpu
        assert cycles["gemm i8mm"] < cycles["gemm dotprod"] < 0.5 * cycles["d2q2"], cpu
