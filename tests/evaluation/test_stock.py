"""Stock files: the same tensors as llama.cpp's tools called by hand; what is kept and reused."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from d2q_edge.calibration.text import PROSE
from d2q_edge.errors import D2QError
from d2q_edge.evaluation import stock
from d2q_edge.evaluation.stock import StockQuantizer, parse_types
from d2q_edge.export.model_file import export
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.runtime.tools import Tools
from tests.availability import require_tool
from tests.conftest import ExampleFiles
from tests.evaluation.fake_tools import FakeTools


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A short calibration text."""
    path = tmp_path / "text.txt"
    path.write_text(PROSE.read_text("utf-8")[:6000], "utf-8")
    return path


@pytest.fixture
def tools() -> Tools:
    require_tool("llama-imatrix")
    return Tools(require_tool("llama-quantize").parent)


@pytest.fixture
def cache(tmp_path: Path, environment: Callable[..., None], tools: Tools) -> Path:
    """An empty cache; `tools` are found before it is there."""
    environment(XDG_CACHE_HOME=str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.slow
@pytest.mark.parametrize("pure", [False, True])
def test_as_by_hand(
    example_files: ExampleFiles, text: Path, tmp_path: Path, cache: Path, tools: Tools, pure: bool
) -> None:
    # One thread, because the order of sums decides the last bits.
    StockQuantizer(example_files.f16, str(text), pure, tools, threads=1).quantize("Q2_K", tmp_path / "ours.gguf")
    matrix, by_hand = tmp_path / "matrix.gguf", tmp_path / "by-hand.gguf"
    tools.run("llama-imatrix", "-m", example_files.f16, "-f", text, "-o", matrix, "-c", "512", "-t", "1")
    tables = ["--pure", "--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0"] if pure else []
    tools.run("llama-quantize", *tables, "--imatrix", matrix, example_files.f16, by_hand, "Q2_K", "1")
    found, expected = GGUFFile(tmp_path / "ours.gguf"), GGUFFile(by_hand)
    assert found.tensors.keys() == expected.tensors.keys()
    for name, info in expected.tensors.items():
        assert found.tensors[name].type_name == info.type_name
        assert np.array_equal(found.raw(name), expected.raw(name)), name
    kinds = {info.type_name for info in found.tensors.values()}
    assert kinds == {"q2_k", "q8_0", "f32"} if pure else "q3_k" in kinds
    assert not list(tmp_path.glob(f"{stock.UNFINISHED}*"))


@pytest.mark.slow
def test_matrix_of_conversations(chat_model: Path, tmp_path: Path, cache: Path, tools: Tools) -> None:
    """They are rendered by the original's chat template, and their special tokens are read as such."""
    export(chat_model, tmp_path / "f16.gguf", "f16")
    chats = [[{"role": "user", "content": f"How many days has year {n}?"}] for n in range(1900, 2010)]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    by_hand = tmp_path / "rendered.txt"
    by_hand.write_text("".join(tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats))
    arguments = ("-m", tmp_path / "f16.gguf", "-f", by_hand, "-o", tmp_path / "matrix.gguf", "-c", "512", "-t", "1")
    tools.run("llama-imatrix", *arguments, "--parse-special")
    calibration = (str(tmp_path / "chats.jsonl"),)
    made = StockQuantizer(tmp_path / "f16.gguf", calibration, tools=tools, threads=1).importance_matrix()
    found, expected = GGUFFile(made), GGUFFile(tmp_path / "matrix.gguf")
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(np.array_equal(found.raw(name), expected.raw(name)) for name in expected.tensors)


def test_matrix_is_kept(example_files: ExampleFiles, text: Path, cache: Path, tools: Tools) -> None:
    quantizer = StockQuantizer(example_files.f16, str(text), tools=tools, threads=1)
    first = quantizer.importance_matrix()
    assert first.is_file() and first.is_relative_to(cache)
    without_tools = replace(quantizer, tools=Tools(cache))
    assert without_tools.importance_matrix() == first
    with pytest.raises(D2QError, match="not built"):
        replace(without_tools, original=example_files.d2q2).importance_matrix()
    text.write_text(text.read_text("utf-8") + "more")
    with pytest.raises(D2QError, match="not built"):
        without_tools.importance_matrix()


@pytest.mark.slow
def test_failures(example_files: ExampleFiles, text: Path, tmp_path: Path, cache: Path, tools: Tools) -> None:
    short, target = tmp_path / "short.txt", tmp_path / "x.gguf"
    short.write_text("Too short.")
    quantizer = StockQuantizer(example_files.f16, str(text), tools=tools, threads=1)
    with pytest.raises(D2QError, match=r"text has [1-9] tokens, but an importance matrix needs 1024: choose"):
        replace(quantizer, calibration=str(short)).importance_matrix()
    assert list(cache.rglob("*.gguf")) == [], "nothing unfinished stays"
    with pytest.raises(D2QError, match="llama-quantize failed"):
        quantizer.quantize("Q9_X", target)
    assert not list(tmp_path.glob("*x.gguf")) and not list(tmp_path.glob(f"{stock.UNFINISHED}*"))
    with pytest.raises(D2QError, match="can't read the text"):
        replace(quantizer, calibration=str(tmp_path / "none.txt")).quantize("Q2_K", target)
    with pytest.raises(D2QError, match=r"can't read .*none.gguf"):
        replace(quantizer, original=tmp_path / "none.gguf").quantize("Q2_K", target)


@pytest.mark.slow
def test_what_a_killed_process_left_is_removed(
    example_files: ExampleFiles, text: Path, cache: Path, tools: Tools
) -> None:
    (cache / "d2q-edge" / "imatrix" / "partial-abandoned").mkdir(parents=True)
    matrix = StockQuantizer(example_files.f16, str(text), tools=tools, threads=1).importance_matrix()
    assert list(matrix.parent.iterdir()) == [matrix]


class TestKept:
    """Which stock files in a directory are reused."""

    @pytest.fixture
    def fake(self, example_files: ExampleFiles, cache: Path) -> FakeTools:
        return FakeTools(result=example_files.d2q2)

    @pytest.fixture
    def quantizer(self, example_files: ExampleFiles, tmp_path: Path, fake: FakeTools) -> StockQuantizer:
        return StockQuantizer(Path(shutil.copy2(example_files.f16, tmp_path / "f16.gguf")), tools=fake)

    def test_the_same_request(
        self, quantizer: StockQuantizer, fake: FakeTools, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        kept = tmp_path / "new" / "kept"
        made = quantizer.files(["Q2_K", "IQ2_XS"], kept)
        assert [words[-2] for words in fake.quantized] == list(made) == ["Q2_K", "IQ2_XS"]
        assert capsys.readouterr().err == ""
        link = tmp_path / "link"
        link.symlink_to(tmp_path)
        again = replace(quantizer, original=link / "f16.gguf").files(["IQ2_XS"], kept)
        assert again == {"IQ2_XS": made["IQ2_XS"]}
        assert len(fake.quantized) == 2
        assert capsys.readouterr().err == f"{made['IQ2_XS']} is there already\n"
        assert sorted(kept.iterdir()) == sorted(made.values())

    def test_other_requests(self, quantizer: StockQuantizer, fake: FakeTools, text: Path, tmp_path: Path) -> None:
        """Neither the original's name nor the stock file's age makes it the right one."""
        original, kept = quantizer.original, tmp_path / "kept"
        quantizer.files(["Q2_K"], kept)
        (tmp_path / "other").mkdir()
        other = Path(shutil.copy2(original, tmp_path / "other" / original.name))
        os.utime(other, (0, 0))
        replace(quantizer, original=other).files(["Q2_K"], kept)
        os.utime(original, (0, 0))
        quantizer.files(["Q2_K"], kept)
        replace(quantizer, pure=True).files(["Q2_K"], kept)
        quantizer.files(["Q3_K"], kept)
        with_text = replace(quantizer, calibration=str(text))
        with_text.files(["Q2_K"], kept)
        text.write_text(text.read_text("utf-8") + "more", "utf-8")
        with_text.files(["Q2_K"], kept)
        with original.open("ab") as file:
            file.write(bytes(1))
        os.utime(original, (0, 0))
        quantizer.files(["Q2_K"], kept)
        assert len(fake.quantized) == len(list(kept.iterdir())) == 8, "side by side"

    def test_files_of_others_are_left_alone(self, quantizer: StockQuantizer, fake: FakeTools, tmp_path: Path) -> None:
        kept = tmp_path / "kept"
        kept.mkdir()
        (kept / "f16-Q2_K.gguf").write_text("mine")
        made = quantizer.files(["Q2_K"], kept)["Q2_K"]
        made.write_text("mine, too, and no GGUF file")
        said = r"Q2_K-[0-9a-f]{16}.gguf has a stock file's name but isn't one \(.*\); remove it, or choose another dir"
        with pytest.raises(D2QError, match=said):
            quantizer.files(["IQ2_XS", "Q2_K"], kept)
        assert made.read_text() == "mine, too, and no GGUF file"
        assert (kept / "f16-Q2_K.gguf").read_text() == "mine"
        made.unlink()
        made.mkdir()
        with pytest.raises(D2QError, match=said):
            quantizer.files(["Q2_K"], kept)
        assert len(fake.quantized) == 1

    def test_directory_without_write_permission(
        self, quantizer: StockQuantizer, fake: FakeTools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is found before anything is made, and what is there can be used."""
        kept = tmp_path / "kept"
        made = quantizer.files(["Q2_K"], kept)

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(tempfile, "mkdtemp", refuse)
        said = r"^can't write to .*kept \(Permission denied\); choose another directory for the stock files$"
        with pytest.raises(D2QError, match=said):
            quantizer.files(["Q2_K", "Q3_K"], kept)
        assert quantizer.files(["Q2_K"], kept) == made
        assert len(fake.quantized) == 1
        with pytest.raises(D2QError, match=r"can't write to .*f16.gguf \(File exists\); choose another directory"):
            quantizer.files(["Q2_K"], quantizer.original)


def test_types() -> None:
    assert parse_types("q2_k, IQ2_XS,,Q2_K") == ("Q2_K", "IQ2_XS")
    assert parse_types("") == ()
    with pytest.raises(D2QError, match=r"D2Q2 isn't a stock type that can be made; there are Q2_K, "):
        parse_types("Q2_K,d2q2")


def test_every_type_is_known_to_the_tool() -> None:
    said = subprocess.run([require_tool("llama-quantize"), "--help"], capture_output=True, text=True)
    for name in stock.TYPES:
        assert f" or  {name} " in (said.stdout + said.stderr), name
