"""The machine's read bandwidth by number of threads, and the share of it that generation reaches.

A token reads every weight once, except the embeddings, of which it reads a row: bytes read times tokens per second is
what generation takes from memory. The rest of the bandwidth is lost to arithmetic, and to what isn't weights.
"""

import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from d2q_edge.evaluation.benchmark import GENERATION, run_rounds
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.options import BenchmarkOptions
from d2q_edge.runtime.tools import INSTALLED, Tools

BYTES = 1 << 29
"""What is read: more than any cache."""
READS = 5
EMBEDDING, HEAD = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class Roofline:
    """Results by number of threads, medians over the rounds.

    Attributes:
        bandwidth: bytes per second that threads can read.
        generation: bytes per second that generation reads, by file.
    """

    bandwidth: dict[int, float]
    generation: dict[str, dict[int, float]]

    def to_json(self) -> dict[str, object]:
        """Return plain values for json.dump."""
        return {
            "read_bytes_per_second": self.bandwidth,
            "generation_bytes_per_second": self.generation,
            "share": {name: self.shares(name) for name in self.generation},
        }

    def shares(self, name: str) -> dict[int, float]:
        """Return what generation reads over what can be read."""
        return {threads: read / self.bandwidth[threads] for threads, read in self.generation[name].items()}

    def describe(self) -> str:
        """Format a table for a terminal."""
        width = max(map(len, ("GB/s", "can be read", *self.generation)))
        lines = [
            f"{'GB/s':{width}}" + "".join(f"{f'{n} threads' if n > 1 else '1 thread':>18}" for n in self.bandwidth)
        ]
        lines.append(f"{'can be read':{width}}" + "".join(f"{each / 1e9:18.1f}" for each in self.bandwidth.values()))
        for name, read in self.generation.items():
            shares = self.shares(name)
            lines.append(f"{name:{width}}" + "".join(f"{read[n] / 1e9:11.1f} ({shares[n]:4.0%})" for n in read))
        return "\n".join(lines)


def bytes_per_token(path: Path) -> int:
    """Return the bytes of weights that a token reads: all but embeddings that aren't the head as well.

    A mixture of experts reads fewer.
    """
    tensors = GGUFFile(path).tensors
    return sum(t.nbytes for name, t in tensors.items() if name != EMBEDDING or HEAD not in tensors)


def read_bandwidth(program: Path, threads: int) -> float:
    """Return bytes per second, the best of several reads."""
    command = [str(program), str(threads), str(READS), str(BYTES)]
    return max(map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())) * 1e9


def measure(files: Sequence[Path], options: BenchmarkOptions, tools: Tools = INSTALLED) -> Roofline:
    """Measure bandwidth and files in turn.

    Raises:
        D2QError: see run_rounds.
    """
    source = Path(__file__).with_suffix(".c")
    bandwidth: dict[int, list[float]] = {threads: [] for threads in options.threads}
    read: dict[str, dict[int, list[float]]] = {path.name: {n: [] for n in options.threads} for path in files}
    one = BenchmarkOptions(options.prompt, options.generation, options.threads, 1, options.repack)
    flags = ("--repack", int(options.repack))
    with tempfile.TemporaryDirectory() as work:
        program = Path(work) / "roofline"
        command = ["cc", "-std=gnu11", "-O3", "-march=native", str(source), "-lpthread", "-o", str(program)]
        subprocess.run(command, check=True)
        for _ in range(options.rounds):
            for threads, seen in bandwidth.items():
                seen.append(read_bandwidth(program, threads))
            times = run_rounds({path.name: ("-m", path, *flags) for path in files}, one, tools) if files else {}
            for path in files:
                for threads, rates in read[path.name].items():
                    seconds = times[f"{GENERATION}-{threads}"][0][path.name]
                    rates.append(bytes_per_token(path) * options.generation / seconds)
    return Roofline(
        {threads: statistics.median(seen) for threads, seen in bandwidth.items()},
        {name: {n: statistics.median(rates) for n, rates in by.items()} for name, by in read.items()},
    )
