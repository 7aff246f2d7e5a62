"""Comparisons: results against evaluate's, the table, what is kept, and errors."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from d2q_edge.calibration.text import load_evaluation
from d2q_edge.errors import D2QError
from d2q_edge.evaluation.compare import compare, short_names
from d2q_edge.evaluation.comparison import GIVEN, REFERENCE, STOCK, Comparison, Row, size_text
from d2q_edge.evaluation.perplexity import evaluate, scored_logits
from d2q_edge.evaluation.reference import reference
from d2q_edge.evaluation.stock import StockQuantizer
from d2q_edge.evaluation.token_scores import log_softmax
from d2q_edge.export.model_file import export
from d2q_edge.options import ComparisonOptions
from d2q_edge.runtime.llama_model import LlamaModel
from d2q_edge.runtime.tools import Tools
from tests.availability import require_runtime
from tests.conftest import ExampleFiles
from tests.evaluation.fake_tools import FakeTools
from tests.evaluation.report.comparisons import comparison, evaluation

Make = Callable[..., Path]
QUICK = ComparisonOptions(chunks=3, context=128, speed=False)
QUICKEST = ComparisonOptions(chunks=1, context=64, speed=False)


@pytest.mark.slow
class TestNumbers:
    @pytest.fixture(scope="class")
    @staticmethod
    def result(example_files: ExampleFiles) -> Comparison:
        require_runtime()
        return compare(example_files.f16, [example_files.d2q2, example_files.d2q3], QUICK)

    def test_are_those_of_evaluate(self, result: Comparison, example_files: ExampleFiles) -> None:
        """Apart from the reference's half precision."""
        assert [(row.name, row.kind) for row in result.rows] == [("f16", REFERENCE), ("d2q3", GIVEN), ("d2q2", GIVEN)]
        for row, path in zip(result.rows, (example_files.f16, example_files.d2q3, example_files.d2q2), strict=True):
            original = None if path == example_files.f16 else example_files.f16
            expected = evaluate(path, original, "builtin", 3, 128).to_json()
            for name, value in row.evaluation.to_json().items():
                assert value == (pytest.approx(expected[name], rel=1e-3) if value is not None else None), name

    def test_names_and_layers(self, result: Comparison) -> None:
        assert result.model == "Tiny Qwen3"
        assert result.rows[2].allocation["attn_q"] == dict.fromkeys(range(4), "d2q2")
        assert {row["name"]: row["best_at_its_size"] for row in result.to_json()["files"]} == {
            "f16": False,
            "d2q3": True,
            "d2q2": True,
        }
        json.dumps(result.to_json())


def test_reference_is_kept_in_half_precision(example_files: ExampleFiles, tmp_path: Path) -> None:
    require_runtime()
    text = load_evaluation("builtin")
    with reference(example_files.f16, text, 2, 64, tmp_path) as base:
        with LlamaModel(example_files.f16, 64) as model:
            expected = log_softmax(scored_logits(model, base.windows[1]))
        assert base.scores.shape == (2, 31, 4096)
        np.testing.assert_allclose(base.scores[1], expected, rtol=2**-10)
        same = base.evaluate(example_files.f16)
        assert same.kl_divergence_mean is not None
        # Half precision costs next to nothing.
        assert 0 <= same.kl_divergence_mean < 2e-6
        assert same.top1_agreement is not None and same.top1_agreement > 0.99
        assert [path.name for path in tmp_path.iterdir()] == ["reference.f16"]
    assert list(tmp_path.iterdir()) == []


def test_stock_files_and_speeds(example_files: ExampleFiles, tmp_path: Path, environment: Callable[..., None]) -> None:
    require_runtime()
    environment(XDG_CACHE_HOME=str(tmp_path / "cache"))  # of the importance matrix
    tools = FakeTools(result=example_files.d2q3, seconds=lambda call, _: (1, call))
    options = ComparisonOptions(
        chunks=1, context=64, stock=("Q2_K",), pure=True, threads=3, rounds=3, prompt=128, generation=8
    )
    scratch = tmp_path / "scratch"
    result = compare(example_files.f16, [example_files.d2q2], options, scratch=scratch, tools=tools)
    assert [(words[0], words[-2]) for words in tools.quantized] == [("--pure", "Q2_K")]
    assert {(row.name, row.kind) for row in result.rows} == {("f16", REFERENCE), ("d2q2", GIVEN), ("Q2_K", STOCK)}
    runs = [Path(options["-m"]).name for options in tools.benched]
    assert runs == ["f16.gguf", "d2q2.gguf", runs[2]] * 3, "files take turns"
    assert {options["-t"] for options in tools.benched} == {"3"}
    assert re.fullmatch(r"f16-Q2_K-pure-[0-9a-f]{16}\.gguf", runs[2])
    # The medians of 1, 4, 7; of 2, 5, 8; and of 3, 6, 9 seconds.
    speeds = {row.name: row.speeds for row in result.rows}
    assert speeds["f16"] == {"prompt": 128, "generation": 8 / 4}
    assert speeds["Q2_K"]["generation"] == pytest.approx(8 / 6)
    assert list(scratch.iterdir()) == [], "nothing large stays"


def test_stock_files_can_be_kept(example_files: ExampleFiles, tmp_path: Path, environment: Callable[..., None]) -> None:
    require_runtime()
    environment(XDG_CACHE_HOME=str(tmp_path / "cache"))
    (tmp_path / "mine.txt").write_text("A text of my own. " * 500)
    tools = FakeTools(result=example_files.d2q3)
    options = replace(QUICKEST, stock=("Q2_K",), calibration=str(tmp_path / "mine.txt"))
    for _ in range(2):
        compare(example_files.f16, [], options, keep_stock=tmp_path / "kept", tools=tools)
    assert len(tools.quantized) == 1, "reused the second time"
    assert "--pure" not in tools.quantized[0]
    expected = StockQuantizer(example_files.f16, str(tmp_path / "mine.txt"), tools=tools)
    assert [*expected.files(["Q2_K"], tmp_path / "kept").values()] == [*(tmp_path / "kept").iterdir()]


def test_what_a_killed_comparison_left_is_removed(example_files: ExampleFiles, tmp_path: Path) -> None:
    require_runtime()
    (tmp_path / "compare-abandoned").mkdir()
    (tmp_path / "compare-abandoned" / "reference.f16").write_bytes(bytes(1000))
    compare(example_files.f16, [example_files.d2q2], QUICKEST, scratch=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_reports_are_found(example_files: ExampleFiles, tmp_path: Path) -> None:
    require_runtime()
    size = example_files.d2q2.stat().st_size
    (tmp_path / "r.json").write_text(json.dumps({"bytes": size, "layer_errors": {"a": 1}}))
    files = [example_files.d2q2, example_files.d2q3]
    result = compare(example_files.f16, files, QUICKEST, reports=[tmp_path / "r.json"])
    found = {row.name: row.conversion for row in result.rows}
    assert found == {"f16": None, "d2q3": None, "d2q2": {"bytes": size, "layer_errors": {"a": 1}}}


class TestTable:
    def test_columns(self) -> None:
        lines = comparison().describe().splitlines()
        assert len({len(line) for line in lines[:-1]}) == 1, "columns line up"
        assert max(map(len, lines)) <= 100
        assert lines[1].split() == ["f16", "16", "MB", "16.000", "21.500", "-", "-", "-", "80.0", "5.0"]
        values = ["mine", "*", "2", "MB", "2.000", "21.500", "0.3000", "±", "0.0150", "1.800", "75.0%", "110.0", "30.0"]
        assert lines[4].split() == values
        assert [line.split()[0] for line in lines[1:-1] if "*" in line] == ["other", "mine"]

    def test_best(self) -> None:
        one = comparison()
        rows = {row.name: row for row in one.rows}

        def beats(first: tuple[int, float], second: tuple[int, float]) -> bool:
            a, b = (Row("x", GIVEN, evaluation(*each)) for each in (first, second))
            return a.beats(b)

        assert [row.name for row in one.best()] == ["other", "mine"]
        assert rows["mine"].beats(rows["IQ2_XS"]), "a thousandth larger is as large"
        assert beats((100, 0.1), (100, 0.2)) and not beats((100, 0.2), (100, 0.1))
        assert beats((100, 0.1), (200, 0.1)) and not beats((200, 0.1), (100, 0.1))
        assert not beats((100, 0.1), (100, 0.1))
        assert not beats((102, 0.1), (100, 0.2))

    def test_sizes(self) -> None:
        assert [size_text(count) for count in (999, 1234, 5_678_901, 2_345_678_901)] == [
            "0.999 kB", "1.234 kB", "5.679 MB", "2.346 GB",
        ]  # fmt: skip


class TestBadRequests:
    def test_nothing_to_compare(self, example_files: ExampleFiles) -> None:
        with pytest.raises(D2QError, match="there is nothing to compare with the reference; name files, or types"):
            compare(example_files.f16, [], QUICK)

    def test_the_reference_itself(self, example_files: ExampleFiles) -> None:
        with pytest.raises(D2QError, match="is the reference, and it is among the files"):
            compare(example_files.f16, [example_files.d2q2, example_files.f16], QUICK)

    def test_another_model(self, example_files: ExampleFiles, make_checkpoint: Make, tmp_path: Path) -> None:
        require_runtime()
        export(make_checkpoint("llama"), tmp_path / "llama.gguf", "f16")
        with pytest.raises(D2QError, match="they are different models"):
            compare(example_files.f16, [tmp_path / "llama.gguf"], QUICK, scratch=tmp_path / "scratch")
        assert list((tmp_path / "scratch").iterdir()) == []

    def test_missing_files(self, example_files: ExampleFiles, tmp_path: Path) -> None:
        for files in ([tmp_path / "none.gguf"], [example_files.d2q2, tmp_path / "none.gguf"]):
            with pytest.raises(D2QError, match=r"there is no file .*none.gguf"):
                compare(example_files.f16, files, QUICK)

    def test_tools_are_looked_for_first(self, example_files: ExampleFiles, tmp_path: Path) -> None:
        scratch = tmp_path / "scratch"
        with pytest.raises(D2QError, match="llama-imatrix is not built: run `d2q-edge runtime install --tools`"):
            compare(example_files.f16, [], ComparisonOptions(stock=("Q2_K",)), scratch=scratch, tools=Tools(tmp_path))
        assert not scratch.exists(), "before any work"

    def test_no_room(self, example_files: ExampleFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        require_runtime()
        monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1_000_000})())
        with pytest.raises(D2QError, match=r"take 1,548,288 bytes in .*, which has 1,000,000; use --chunks 1, or set"):
            compare(example_files.f16, [example_files.d2q2], QUICK, scratch=tmp_path)

    def test_speeds_are_left_out_without_the_tool(
        self, example_files: ExampleFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        require_runtime()
        options = ComparisonOptions(chunks=1, context=64)
        result = compare(example_files.f16, [example_files.d2q2], options, tools=Tools(tmp_path))
        assert all(not row.speeds for row in result.rows)
        assert "no speeds: the tool llama-bench is not built" in capsys.readouterr().err


def test_names_that_would_be_the_same(tmp_path: Path) -> None:
    paths = [tmp_path / "a.gguf", tmp_path / "b" / "a.gguf", tmp_path / "c.gguf"]
    assert list(short_names(paths).values()) == [str(paths[0]), str(paths[1]), "c"]


def test_names_that_are_no_text() -> None:
    """Bytes that aren't UTF-8 are lone surrogates in Python, which can't be written to a terminal or a page."""
    assert list(short_names([Path(os.fsdecode(b"a\xff\n.gguf"))]).values()) == ["a\\udcff\\n"]
