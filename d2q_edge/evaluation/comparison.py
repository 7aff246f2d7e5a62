"""Hold the result of `d2q-edge compare`: a row for every file, and which of them are the best of their size."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from d2q_edge.evaluation.benchmark import GENERATION, PROMPT
from d2q_edge.evaluation.perplexity import Evaluation
from d2q_edge.options import ComparisonOptions

REFERENCE, GIVEN, STOCK = "reference", "file", "stock"
"""Kinds of rows."""
SAME_SIZE = 1.005
"""Files whose sizes differ by less than this factor count as equally large."""


@dataclass(frozen=True)
class Row:
    """One file.

    Attributes:
        name: in the table.
        kind: REFERENCE, GIVEN or STOCK.
        evaluation: accuracy and size; without KL divergence for the reference.
        speeds: tokens per second by PROMPT and GENERATION; empty if they weren't measured.
        allocation: types of its blocks' matrices, see inspection.allocation.
        conversion: the report of `convert --report`, if one was found.
    """

    name: str
    kind: str
    evaluation: Evaluation
    speeds: Mapping[str, float] = field(default_factory=dict)
    allocation: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    conversion: Mapping[str, Any] | None = None

    def beats(self, other: "Row") -> bool:
        """Return whether this file is as small as another one and nearer to the reference, or as near and smaller."""
        own, others = self.evaluation.kl_divergence_mean, other.evaluation.kl_divergence_mean
        size, limit = self.evaluation.bytes, other.evaluation.bytes
        if own is None or others is None:
            return False
        return (own < others and size <= SAME_SIZE * limit) or (own == others and SAME_SIZE * size < limit)


@dataclass(frozen=True)
class Comparison:
    """All files.

    Attributes:
        model: name of the model, from the reference.
        rows: the reference, then the other files from the largest to the smallest.
        options: what was measured.
        threads: number of threads that speeds were measured with.
    """

    model: str
    rows: Sequence[Row]
    options: ComparisonOptions
    threads: int

    def to_json(self) -> dict[str, Any]:
        """Return plain values for json.dump."""
        best, files = self.best(), []
        for row in self.rows:
            own = {"tokens_per_second": dict(row.speeds), "best_at_its_size": row in best}
            files.append({"name": row.name, "kind": row.kind, **row.evaluation.to_json(), **own})
        return {"model": self.model, "options": {**asdict(self.options), "threads": self.threads}, "files": files}

    def best(self) -> list[Row]:
        """Return the rows that no other row beats."""
        compared = [row for row in self.rows if row.evaluation.kl_divergence_mean is not None]
        return [row for row in compared if not any(other.beats(row) for other in compared)]

    def describe(self) -> str:
        """Format a table for a terminal."""
        best = self.best()
        width = max(12, *(len(row.name) + 2 for row in self.rows))
        lines = [
            f"{'file':{width}}{'size':>10}{'bits/w':>8}{'perplexity':>12}{'KL divergence':>18}{'99 %':>8}"
            f"{'top-1':>8}{'prompt t/s':>12}{'gen. t/s':>10}"
        ]
        for row in self.rows:
            e = row.evaluation
            divergence = "-"
            if e.kl_divergence_mean is not None:
                divergence = f"{e.kl_divergence_mean:.4f} ± {e.kl_divergence_stderr:.4f}"
            p99 = "-" if e.kl_divergence_p99 is None else f"{e.kl_divergence_p99:.3f}"
            agreement = "-" if e.top1_agreement is None else f"{e.top1_agreement:.1%}"
            prompt, generation = (f"{row.speeds[p]:.1f}" if p in row.speeds else "-" for p in (PROMPT, GENERATION))
            lines.append(
                f"{row.name + (' *' if row in best else ''):{width}}{size_text(e.bytes):>10}{e.bits_per_weight:8.3f}"
                f"{e.perplexity:12.3f}{divergence:>18}{p99:>8}{agreement:>8}{prompt:>12}{generation:>10}"
            )
        lines.append("* no other file is as small and as near to the original")
        return "\n".join(lines)


def size_text(count: int) -> str:
    """Format a number of bytes with four digits."""
    unit, name = (10**9, "GB") if count >= 10**9 else (10**6, "MB") if count >= 10**6 else (10**3, "kB")
    return f"{count / unit:.4g} {name}"
