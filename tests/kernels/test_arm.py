"""Matrix multiplications and a whole model on emulated ARM CPUs, compared with references and with this machine."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from d2q_edge.calibration.text import EVALUATION
from d2q_edge.runtime.generate import generate
from d2q_edge.runtime.installed import library_directory
from tests.conftest import ExampleFiles
from tests.kernels import arm
from tests.kernels.ggml import Ggml

HERE = Path(__file__).parent
GREEDY = 32


@dataclass(frozen=True)
class Output:
    """Output of run_model: natural log probabilities of a text's tokens; greedy tokens and their lead in logits."""

    text: np.ndarray
    tokens: list[int]
    leads: list[float]


def _parse(output: str) -> Output:
    text, greedy = output.split("\n\n")
    pairs = [line.split() for line in greedy.splitlines()]
    return Output(
        np.array([float(line) for line in text.splitlines()]), [int(a) for a, _ in pairs], [float(b) for _, b in pairs]
    )


@pytest.fixture(scope="module")
def native(ggml: Ggml, patched_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Link the programs with the installed runtime."""
    del ggml
    folder, libraries = tmp_path_factory.mktemp("native"), library_directory()
    link = [f"-L{libraries}", "-lllama", "-lggml", "-lggml-base", "-lggml-cpu", f"-Wl,-rpath,{libraries}", "-lm"]
    programs = {}
    for name, compiler in (("run_model.cpp", ["g++", "-std=c++17"]), ("mul_mat_harness.c", ["gcc", "-std=gnu11"])):
        programs[name] = folder / Path(name).stem
        flags = ["-O2", "-Wall", "-Wextra", "-Werror", *arm.include_flags(patched_tree)]
        subprocess.run([*compiler, *flags, HERE / name, *link, "-o", programs[name]], check=True)
    return programs


def _check_harness(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith(" checks, 0 bad\n")


def test_matrix_multiplication_here(native: dict[str, Path]) -> None:
    _check_harness(subprocess.run([native["mul_mat_harness.c"]], capture_output=True, text=True, check=False))


@pytest.mark.parametrize("name", arm.TARGETS)
def test_matrix_multiplication_on_arm(patched_tree: Path, tmp_path: Path, name: str) -> None:
    target = arm.TARGETS[name]
    program = arm.link(patched_tree, HERE / "mul_mat_harness.c", target, tmp_path)
    _check_harness(arm.run(program, target.cpu))
    if name != "armv8.0":
        # the kernels are really those of this target: a CPU without its instructions stops at them
        assert arm.run(program, arm.TARGETS["armv8.0"].cpu).returncode != 0


@pytest.mark.parametrize(
    ("name", "bits", "chunks"), [("dotprod", 2, 24), ("dotprod", 3, 24), ("armv8.0", 2, 4), ("i8mm", 2, 4)]
)
def test_model_says_the_same_as_here(
    native: dict[str, Path],
    example_files: ExampleFiles,
    patched_tree: Path,
    tmp_path: Path,
    name: str,
    bits: int,
    chunks: int,
) -> None:
    target = arm.TARGETS[name]
    program = arm.link(patched_tree, HERE / "run_model.cpp", target, tmp_path)
    model = {2: example_files.d2q2, 3: example_files.d2q3}[bits]
    arguments: list[str | Path] = [model, EVALUATION, str(chunks), str(GREEDY)]
    emulated = arm.run(program, target.cpu, arguments)
    assert emulated.returncode == 0, emulated.stderr
    there = _parse(emulated.stdout)
    here = _parse(
        subprocess.run([native["run_model.cpp"], *arguments], capture_output=True, text=True, check=True).stdout
    )
    # Another order of sums changes the rounding of activations, and thereby a token's probability by some percent in
    # this tiny model, at random: perplexity must agree to 0.2 %, or to what that explains.
    difference = there.text - here.text
    assert difference.std() < 0.2
    assert abs(difference.mean()) < max(0.002, 3 * difference.std() / len(difference) ** 0.5)
    # the same text, up to the first near tie of two tokens
    for a, b, lead in zip(there.tokens, here.tokens, here.leads, strict=True):
        if a != b:
            assert lead < 0.2
            break
    assert here.tokens[0] == there.tokens[0]


def test_program_for_the_phone_writes_the_same_text(example_files: ExampleFiles, patched_tree: Path) -> None:
    """A program of llama.cpp works in the build of tools/phone.py for Linux."""
    program = arm.build(patched_tree) / arm.PROGRAM
    prompt = "The old man looked out over the"
    emulated = arm.run(program, arm.TARGETS["armv8.0"].cpu, ["-m", example_files.d2q3, "-n", "6", prompt])
    assert emulated.returncode == 0, emulated.stderr
    # all but the last words: the two stop after different numbers of tokens
    here = prompt + "".join(generate(example_files.d2q3, prompt, 4, temperature=0, seed=0))
    assert emulated.stdout.strip().startswith(here)
