"""Compare the cycles of our ARM kernels with stock llama.cpp's, as llvm-mca models them.

Compiles ggml's kernels and ours from the patched source with the cross compiler, extracts the loop over the blocks from
each function's assembly, and runs llvm-mca on it. The block reciprocal throughput is printed per 256 weights; the dot
product instructions in the loop tell how many weights it handles. `type x8` is the kernel for eight rows that were
interleaved when the model was loaded. For the matrix multiplication it is that of 256 weights and one result, without
the look-up of the weights, which up to 64 columns share. --json prints a map from CPU to `type/stock_type` to the
ratio; below 1 ours is faster.

llvm-mca before LLVM 16 has no model of the Neoverse N1 of its own and takes the Cortex-A57's.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click

from d2q_edge.errors import D2QError
from d2q_edge.runtime import source

CPUS = ("neoverse-n1", "apple-m1")
COMPILER = "aarch64-linux-gnu-gcc"
DOTPROD, I8MM = "armv8.2-a+dotprod+fp16", "armv8.2-a+dotprod+fp16+i8mm"
OUR_TYPES = ("d2q2", "d2q3", "d2q2_64", "d2q3_64")
STOCK_TYPES = ("q2_K", "q3_K", "q4_K", "q4_0")
PAIRS = (
    *(("d2q2", "q2_K"), ("d2q3", "q3_K"), ("d2q2_64", "q4_0"), ("d2q3_64", "q4_0")),
    *((f"{name} x8", name) for name in OUR_TYPES),
)
INSTRUCTION_WEIGHTS = {"sdot": 16, "smmla": 32}
"""Products per instruction: of two vectors of bytes; of two rows with two columns."""
JUMP = re.compile(r"\t(?:b|b\.?[a-z]{2}|cbn?z|tbn?z)\t(?:.*,\s*)?(\.L\w+)$")
RELOCATION = re.compile(r":lo12:[\w.+]+|\.L\w+")


@dataclass(frozen=True)
class Loop:
    """Instructions of an innermost loop, and how many weights times columns an iteration multiplies."""

    lines: list[str]
    weights: int


def assembly(tree: Path, name: str, march: str, output: Path) -> str:
    """Compile one file of ggml/src to assembly."""
    ggml = tree / "vendor/llama.cpp/ggml"
    command = [COMPILER, "-std=gnu11", "-O3", "-DNDEBUG", "-D_GNU_SOURCE", "-w", f"-march={march}", "-S"]
    command += [f"-I{ggml / part}" for part in ("include", "src", "src/ggml-cpu")]
    subprocess.run([*command, ggml / "src" / name, "-o", output], check=True)
    return output.read_text()


def innermost_loops(text: str, function: str) -> list[Loop]:
    """Return the loops of a function that contain dot product instructions and no other loop.

    Raises:
        D2QError: there is no such function or no such loop in it.
    """
    found = re.search(rf"^{function}:\n(.*?)^\t\.size\t{function},", text, re.MULTILINE | re.DOTALL)
    lines = found.group(1).splitlines() if found else []
    labels: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for i, line in enumerate(lines):
        if line.startswith(".L") and line.endswith(":"):
            labels[line[:-1]] = i
        elif (jump := JUMP.match(line)) and jump.group(1) in labels:
            spans.append((labels[jump.group(1)] + 1, i + 1))
    loops = []
    for start, end in spans:
        if any(other != (start, end) and start <= other[0] and other[1] <= end for other in spans):
            continue
        body = [line for line in lines[start:end] if line.startswith("\t") and not line.startswith("\t.")]
        weights = sum(INSTRUCTION_WEIGHTS.get(line.split()[0], 0) for line in body)
        if weights:
            loops.append(Loop([RELOCATION.sub("0", line) for line in body], weights))
    if not loops:
        raise D2QError(f"there is no loop with dot products in {function}")
    return loops


def cycles(loop: Loop, cpu: str, mca: str) -> float:
    """Return the block reciprocal throughput per 256 weights."""
    command = [mca, "-mtriple=aarch64-linux-gnu", f"-mcpu={cpu}", "-mattr=+dotprod,+fullfp16,+i8mm", "-iterations=100"]
    result = subprocess.run(command, input="\n".join(loop.lines) + "\n", capture_output=True, text=True, check=True)
    found = re.search(r"Block RThroughput:\s+([\d.]+)", result.stdout)
    if found is None:
        raise D2QError(f"{mca} did not print a block reciprocal throughput")
    return float(found.group(1)) * 256 / loop.weights


def measure(tree: Path, work: Path, mca: str) -> dict[str, dict[str, float]]:
    """Return cycles per 256 weights for each CPU and kernel."""
    ours = assembly(tree, "d2q/d2q-arm.c", DOTPROD, work / "ours.s")
    stock = assembly(tree, "ggml-cpu/arch/arm/quants.c", DOTPROD, work / "stock.s")
    loops: dict[str, Loop] = {}
    for name in OUR_TYPES:
        partner = "q8_0" if name.endswith("_64") else "q8_K"
        (loops[name],) = innermost_loops(ours, f"ggml_vec_dot_{name}_{partner}")
    repacked = assembly(tree, "d2q/d2q-repack-arm.c", DOTPROD, work / "repacked.s")
    for name in OUR_TYPES:
        (loops[f"{name} x8"],) = innermost_loops(repacked, f"{name}_gemv")
    for name in STOCK_TYPES:
        (loops[name],) = innermost_loops(stock, f"ggml_vec_dot_{name}_{'q8_0' if name == 'q4_0' else 'q8_K'}")
    for label, march in (("dotprod", DOTPROD), ("i8mm", I8MM)):
        text = assembly(tree, "d2q/d2q-arm-gemm.c", march, work / "gemm.s")
        # The shortest loop is the one over a whole block of 256; the others also handle the scales of 32.
        loops[f"gemm {label}"] = min(innermost_loops(text, "multiply_panel"), key=lambda loop: len(loop.lines))
    return {cpu: {name: cycles(loop, cpu, mca) for name, loop in loops.items()} for cpu in CPUS}


@click.command()
@click.option("--llvm-mca", "mca", default="llvm-mca", show_default=True, help="The program to use.")
@click.option("--json", "as_json", is_flag=True, help="Ratios of ours to stock.")
def main(mca: str, as_json: bool) -> None:
    """Print the cycles of the ARM kernels per 256 weights."""
    for program, package in ((mca, "llvm"), (COMPILER, "gcc-aarch64-linux-gnu")):
        if shutil.which(program) is None:
            raise D2QError(f"{program} is missing: install it (Debian, Ubuntu: apt install {package})")
    with tempfile.TemporaryDirectory() as work:
        source.prepare(Path(work) / "tree", Path(work) / "log")
        result = measure(Path(work) / "tree", Path(work), mca)
    ratios = {cpu: {f"{a}/{b}": values[a] / values[b] for a, b in PAIRS} for cpu, values in result.items()}
    if as_json:
        click.echo(json.dumps(ratios, indent=2))
        return
    click.echo("block reciprocal throughput per 256 weights, in cycles\n")
    click.echo(f"{'':20}" + "".join(f"{cpu:>14}" for cpu in CPUS))
    for name in result[CPUS[0]]:
        click.echo(f"{name:20}" + "".join(f"{result[cpu][name]:14.1f}" for cpu in CPUS))
    for ours, stock in PAIRS:
        name = f"{ours}/{stock}"
        click.echo(f"{name:20}" + "".join(f"{ratios[cpu][name]:14.2f}" for cpu in CPUS))


if __name__ == "__main__":
    try:
        main()
    except D2QError as error:
        click.echo(str(error), err=True)
        sys.exit(1)
