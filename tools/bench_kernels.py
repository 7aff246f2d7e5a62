"""Compare the speed of our dot products with stock llama.cpp's, interleaved in one process.

Compiles ggml's kernels and ours from the patched source with tools/bench_kernels.c, for AVX2 only and for this machine
(x86 only). "_x8" is our kernel for interleaved rows, which is compared with our own dot product. Prints a table; --json
prints a map from instruction set to `type/stock_type` to the median ratio of their times over rounds and widths (below
1 ours is faster), --markdown the same ratios as the README's table.

--roofline prints the machine's read bandwidth instead, and what generation with each --model takes of it.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from d2q_edge.errors import D2QError
from d2q_edge.options import BenchmarkOptions
from d2q_edge.runtime import source
from tools import roofline

Times = dict[str, list[tuple[float, float]]]
SOURCES = (
    "ggml-quants.c",
    "ggml-cpu/quants.c",
    "ggml-cpu/arch/x86/quants.c",
    "d2q/d2q-cpu.c",
    "d2q/d2q-q8.c",
    "d2q/d2q-x86.c",
    "d2q/d2q-repack.c",
    "d2q/d2q-repack-x86.c",
    "d2q/d2q-quants.c",
    "d2q/d2q-encode.c",
)
TARGETS = {"avx2": "haswell", "native": "native"}
PAIRS = (
    ("d2q2", "q2_K"),
    ("d2q2", "iq2_xs"),
    ("d2q2", "iq2_s"),
    ("d2q3", "q3_K"),
    ("d2q3", "iq3_xxs"),
    ("d2q3", "q4_K"),
    ("d2q2_64", "q4_0"),
    ("d2q3_64", "q4_0"),
    *((f"{name}_x8", name) for name in ("d2q2", "d2q3", "d2q2_64", "d2q3_64")),
)


def compile_bench(tree: Path, target: str, output: Path) -> None:
    """Build the benchmark from a patched tree for one value of -march."""
    ggml = tree / "vendor/llama.cpp/ggml"
    command = ["cc", "-std=gnu11", "-O3", "-DNDEBUG", "-D_GNU_SOURCE", "-w", f"-march={target}", "-mtune=native"]
    command += [f"-I{ggml / part}" for part in ("include", "src", "src/ggml-cpu")]
    command += [str(Path(__file__).with_suffix(".c")), *(str(ggml / "src" / name) for name in SOURCES)]
    subprocess.run([*command, "-lm", "-o", str(output)], check=True)


def run_bench(program: Path, columns: int, rounds: int, stream_bytes: int) -> Times:
    """Return nanoseconds per dot product, (cached, streamed), for every type and round."""
    arguments = [str(program), str(columns), str(rounds), str(stream_bytes)]
    times: Times = {}
    for line in subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.splitlines():
        name, cached, streamed = line.split()
        times.setdefault(name, []).append((float(cached), float(streamed)))
    return times


def ratios(runs: list[Times], which: int) -> dict[str, float]:
    """Return the median over all rounds of ours over stock, for cached (0) or streamed (1) rows."""
    return {
        f"{ours}/{stock}": statistics.median(
            a[which] / b[which] for times in runs for a, b in zip(times[ours], times[stock], strict=True)
        )
        for ours, stock in PAIRS
    }


def print_table(target: str, columns: int, times: Times) -> None:
    """Print medians in nanoseconds and the ratios."""
    click.echo(f"\n{target}, {columns} columns: nanoseconds per dot product, cached and streamed")
    for name, rounds in times.items():
        cached, streamed = (statistics.median(values) for values in zip(*rounds, strict=True))
        click.echo(f"  {name:10} {cached:9.1f} {streamed:9.1f}")
    for which, label in enumerate(("cached", "streamed")):
        pairs = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios([times], which).items())
        click.echo(f"  {label}: {pairs}")


def markdown(result: dict[str, dict[str, float]]) -> str:
    """Format the ratios as the README's table: a row for each pair of types, a column for each instruction set."""
    lines = [f"| time of a dot product | {' | '.join(result)} |", "|---" * (1 + len(result)) + "|"]
    for ours, stock in PAIRS:
        values = " | ".join(f"{seen[f'{ours}/{stock}']:.2f}" for seen in result.values())
        against = stock if stock.startswith("d2q") else stock.upper()
        lines.append(f"| {ours} / {against} | {values} |")
    return "\n".join(lines)


@click.command()
@click.option("--columns", multiple=True, type=int, default=(4096, 14336), show_default=True)
@click.option("--rounds", default=21, show_default=True)
@click.option("--stream-mb", default=64, show_default=True, help="Megabytes of rows of each type to stream.")
@click.option("--json", "as_json", is_flag=True, help="Ratios of cached rows, all widths together.")
@click.option("--markdown", "as_markdown", is_flag=True, help="The same ratios as a Markdown table.")
@click.option(
    "--roofline", "as_roofline", is_flag=True, help="Read bandwidth, and the share of it that --model reaches."
)
@click.option("--model", multiple=True, type=click.Path(path_type=Path), help="With --roofline: a GGUF file.")
@click.option("--threads", type=int, multiple=True, default=BenchmarkOptions.threads, show_default=True)
def main(
    columns: tuple[int, ...],
    rounds: int,
    stream_mb: int,
    as_json: bool,
    as_markdown: bool,
    as_roofline: bool,
    model: tuple[Path, ...],
    threads: tuple[int, ...],
) -> None:
    """Time our dot products against stock ones on this machine."""
    if as_roofline:
        seen = roofline.measure(model, BenchmarkOptions(prompt=0, threads=threads))
        click.echo(json.dumps(seen.to_json(), indent=2) if as_json else seen.describe())
        return
    result: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as work:
        tree = Path(work) / "tree"
        source.prepare(tree, Path(work) / "log")
        for name, target in TARGETS.items():
            program = Path(work) / f"bench-{name}"
            compile_bench(tree, target, program)
            runs = []
            for width in columns:
                runs.append(run_bench(program, width, rounds, stream_mb * 1_000_000))
                if not (as_json or as_markdown):
                    print_table(name, width, runs[-1])
            result[name] = ratios(runs, 0)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    elif as_markdown:
        click.echo(markdown(result))


if __name__ == "__main__":
    try:
        main()
    except D2QError as error:
        click.echo(str(error), err=True)
        sys.exit(1)
