"""Keep what tools/real_model.py measures in a JSON file, and format it: tables in Markdown, a Comparison to draw."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from d2q_edge.calibration.text import Text
from d2q_edge.errors import D2QError
from d2q_edge.evaluation.comparison import GIVEN, REFERENCE, Comparison, Row
from d2q_edge.evaluation.perplexity import Evaluation
from d2q_edge.options import ComparisonOptions
from d2q_edge.utils.json_files import read_json_object

ORIGINAL = "F16"


@dataclass(frozen=True)
class File:
    """A GGUF file: its name in the table, its kind (REFERENCE, STOCK or GIVEN), and where it is."""

    name: str
    kind: str
    path: Path

    @property
    def stamp(self) -> list[int]:
        """Return size and time of the last change, which tell a file from an earlier one in its place."""
        status = self.path.stat()
        return [status.st_size, status.st_mtime_ns]


class Results:
    """Evaluations of files on texts, and their answers, by file; every change is written to disk at once.

    `content` has "texts" (name to SHA-256 and number of chunks) and "files" (name to "kind", "stamp", "evaluations" by
    text and "answers" by question).
    """

    def __init__(self, path: Path) -> None:
        """Read what an earlier run has left at a path.

        Raises:
            D2QError: the file can't be read or isn't JSON.
        """
        self.path = path
        self.content: dict[str, Any] = read_json_object(path) if path.exists() else {"texts": {}, "files": {}}

    def begin(self, files: Sequence[File], texts: Mapping[str, Text], chunks: int) -> None:
        """Set what is in the tables, the original first; results of other files, texts or numbers of chunks go."""
        known, files_before = self.content["texts"], self.content["files"]
        wanted = {name: [text.sha256, chunks] for name, text in texts.items()}
        same_original = files_before.get(ORIGINAL, {}).get("stamp") == files[0].stamp
        entries = {}
        for file in files:
            before = files_before.get(file.name, {})
            if before.get("stamp") != file.stamp:
                before = {}
            kept = {
                n: e for n, e in before.get("evaluations", {}).items() if same_original and known[n] == wanted.get(n)
            }
            own = {"evaluations": kept, "answers": before.get("answers", {})}
            entries[file.name] = {"kind": file.kind, "stamp": file.stamp, **own}
        self.content = {"texts": wanted, "files": entries}
        self._write()

    def has(self, file: File, text: str) -> bool:
        """Return whether a file was measured on a text."""
        return text in self.content["files"][file.name]["evaluations"]

    def add_evaluation(self, file: File, text: str, evaluation: Evaluation) -> None:
        """Keep what was measured of a file on a text."""
        self.content["files"][file.name]["evaluations"][text] = evaluation.to_json()
        self._write()

    def has_answers(self, file: File, questions: Sequence[str]) -> bool:
        """Return whether a file was asked these questions."""
        return list(self.content["files"][file.name]["answers"]) == list(questions)

    def add_answers(self, file: File, answers: Mapping[str, str]) -> None:
        """Keep a file's answers, by question."""
        self.content["files"][file.name]["answers"] = dict(answers)
        self._write()

    def comparison(self) -> Comparison:
        """Return the files from the largest to the smallest, the original first, with their means over all texts.

        Raises:
            D2QError: nothing was measured yet.
        """
        names = list(self.content["texts"])
        entries = {n: e for n, e in self.content["files"].items() if set(e["evaluations"]) == set(names)}
        if ORIGINAL not in entries:
            raise D2QError(f"{self.path} has no results; run this without --print-only first")
        rows = [Row(name, entry["kind"], _mean(self._evaluations(name))) for name, entry in entries.items()]
        rows.sort(key=lambda row: (row.kind != REFERENCE, -row.evaluation.bytes))
        return Comparison("", rows, ComparisonOptions(speed=False), 0)

    def table(self) -> str:
        """Format sizes and KL divergences, with a column for each text."""
        texts = list(self.content["texts"])
        heads = ["file", "bytes", "bits/weight", *texts, "mean"]
        lines = [f"| {' | '.join(heads)} |", "|---" + "|---:" * (len(heads) - 1) + "|"]
        for row in self.comparison().rows:
            name = f"**{row.name}**" if row.kind == GIVEN else row.name
            each = [evaluation.kl_divergence_mean for evaluation in self._evaluations(row.name)]
            values = ["-" if value is None else f"{value:.3f}" for value in (*each, row.evaluation.kl_divergence_mean)]
            cells = [name, f"{row.evaluation.bytes:,}", f"{row.evaluation.bits_per_weight:.2f}", *values]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    def answers(self) -> str:
        """Format a table for each question, with every file's answer."""
        files = {row.name: self.content["files"][row.name]["answers"] for row in self.comparison().rows}
        blocks = []
        for question in files[ORIGINAL]:
            lines = ["", f"| file | {question} |", "|---|---|"]
            for name, answers in files.items():
                shown = answers.get(question, "").replace("|", "\\|").replace("\n", "<br>")
                lines.append(f"| {name} | {shown} |")
            blocks.append("\n".join(lines))
        return "\n".join(blocks)

    def _evaluations(self, name: str) -> list[Evaluation]:
        found = self.content["files"][name]["evaluations"]
        return [Evaluation(**found[text]) for text in self.content["texts"]]

    def _write(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1, ensure_ascii=False), "utf-8")
        partial.replace(self.path)


def _mean(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Return a file's evaluation with the mean of the KL divergences on all texts, which count alike."""
    values = [e.kl_divergence_mean for e in evaluations if e.kl_divergence_mean is not None]
    errors = [e.kl_divergence_stderr or 0.0 for e in evaluations]
    if not values:  # the original
        return evaluations[0]
    count = len(evaluations)
    mean, error = sum(values) / count, math.hypot(*errors) / count
    return replace(evaluations[0], kl_divergence_mean=mean, kl_divergence_stderr=error)
