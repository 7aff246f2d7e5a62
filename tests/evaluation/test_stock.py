"""Stock files: the same tensors as llama.cpp's tools called by hand, and what is kept and what isn't."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
from tqdm import tqdm

from d2q_edge import runtime
from d2q_edge.calibration.text import BUILTIN
from d2q_edge.errors import D2QError
from d2q_edge.evaluation import stock
from d2q_edge.evaluation.stock import importance_matrix, make_stock_file, parse_types, stock_files
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.runtime import following
from tests.availability import require_tool
from tests.conftest import ExampleFiles


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A short calibration text; the tools run with one thread, because the order of sums decides the last bits."""
    monkeypatch.setattr(stock, "usable_cpus", lambda: 1)
    path = tmp_path / "text.txt"
    path.write_text(BUILTIN["calibration"].read_text("utf-8")[:6000], "utf-8")
    return path


@pytest.fixture
def tools() -> dict[str, Path]:
    return {name: require_tool(name) for name in ("llama-quantize", "llama-imatrix")}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tools: dict[str, Path]) -> Path:
    """An empty cache, except that the tools are found."""
    monkeypatch.setattr(following, "find_tool", lambda name: tools[name])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("pure", [False, True])
def test_as_by_hand(
    example_files: ExampleFiles, text: Path, tmp_path: Path, cache: Path, tools: dict[str, Path], pure: bool
) -> None:
    make_stock_file(example_files.f16, "Q2_K", tmp_path / "ours.gguf", str(text), pure=pure)
    matrix, by_hand = tmp_path / "matrix.gguf", tmp_path / "by-hand.gguf"
    options: list[str | Path] = ["-m", example_files.f16, "-f", text, "-o", matrix, "-c", "512", "-t", "1"]
    subprocess.run([tools["llama-imatrix"], *options], check=True, capture_output=True)
    tables = ["--pure", "--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0"] if pure else []
    options = [*tables, "--imatrix", matrix, example_files.f16, by_hand, "Q2_K", "1"]
    subprocess.run([tools["llama-quantize"], *options], check=True, capture_output=True)
    found, expected = GGUFFile(tmp_path / "ours.gguf"), GGUFFile(by_hand)
    assert found.tensors.keys() == expected.tensors.keys()
    for name, info in expected.tensors.items():
        assert found.tensors[name].type_name == info.type_name
        assert np.array_equal(found.raw(name), expected.raw(name)), name
    kinds = {info.type_name for info in found.tensors.values()}
    assert kinds == {"q2_k", "q8_0", "f32"} if pure else "q3_k" in kinds
    assert not list(tmp_path.glob(f"{stock.UNFINISHED}*"))


def test_matrix_is_kept(example_files: ExampleFiles, text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = importance_matrix(example_files.f16, str(text))
    assert first.is_file() and first.is_relative_to(cache)
    with monkeypatch.context() as patch:
        patch.setattr(stock, "follow_tool", None)
        assert importance_matrix(example_files.f16, str(text)) == first
        with pytest.raises(TypeError):
            # Another text is another matrix.
            text.write_text(text.read_text("utf-8") + "more")
            importance_matrix(example_files.f16, str(text))
        with pytest.raises(TypeError):
            importance_matrix(example_files.d2q2, str(text))


def test_failures(example_files: ExampleFiles, text: Path, tmp_path: Path, cache: Path) -> None:
    text.write_text("Too short.")
    with pytest.raises(D2QError, match=r"text has [1-9] tokens, but an importance matrix needs 1024: choose"):
        importance_matrix(example_files.f16, str(text))
    assert list(cache.rglob("*.gguf")) == [], "nothing half made stays"
    with pytest.raises(D2QError, match="llama-quantize failed"):
        make_stock_file(example_files.f16, "Q9_X", tmp_path / "x.gguf")
    assert not list(tmp_path.glob("*x.gguf")) and not list(tmp_path.glob(f"{stock.UNFINISHED}*"))
    with pytest.raises(D2QError, match="can't read the text"):
        make_stock_file(example_files.f16, "Q2_K", tmp_path / "x.gguf", str(tmp_path / "none.txt"))
    with pytest.raises(D2QError, match=r"can't read .*none.gguf"):
        make_stock_file(tmp_path / "none.gguf", "Q2_K", tmp_path / "x.gguf")


def test_what_a_killed_process_left_is_removed(example_files: ExampleFiles, text: Path, cache: Path) -> None:
    (cache / "d2q-edge" / "imatrix" / "partial-abandoned").mkdir(parents=True)
    matrix = importance_matrix(example_files.f16, str(text))
    assert list(matrix.parent.iterdir()) == [matrix]


class TestKept:
    """Which stock files in a directory are taken again."""

    @pytest.fixture
    def made(self, example_files: ExampleFiles, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
        """The files that were made, without llama.cpp."""
        made: list[Path] = []

        def make(original: Path, type_name: str, target: Path, calibration: str, *, pure: bool) -> None:
            made.append(target)
            target.write_bytes(example_files.d2q2.read_bytes())

        monkeypatch.setattr(stock, "make_stock_file", make)
        return made

    @pytest.fixture
    def original(self, example_files: ExampleFiles, tmp_path: Path) -> Path:
        return Path(shutil.copy2(example_files.f16, tmp_path / "f16.gguf"))

    def test_the_same_request(
        self, original: Path, tmp_path: Path, made: list[Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        found = stock_files(original, ["Q2_K", "IQ2_XS"], tmp_path / "new" / "kept")
        assert list(found) == ["Q2_K", "IQ2_XS"]
        assert list(found.values()) == made
        assert capsys.readouterr().err == ""
        link = tmp_path / "link"
        link.symlink_to(tmp_path)
        assert stock_files(link / "f16.gguf", ["IQ2_XS"], tmp_path / "new" / "kept") == {"IQ2_XS": made[1]}
        assert len(made) == 2
        assert capsys.readouterr().err == f"{made[1]} is there already\n"
        assert sorted((tmp_path / "new" / "kept").iterdir()) == sorted(made)

    def test_other_requests(self, original: Path, text: Path, tmp_path: Path, made: list[Path]) -> None:
        """The name of the original and the age of the file don't make it the right one."""
        kept = tmp_path / "kept"
        stock_files(original, ["Q2_K"], kept)
        (tmp_path / "other").mkdir()
        other = Path(shutil.copy2(original, tmp_path / "other" / original.name))
        os.utime(other, (0, 0))
        stock_files(other, ["Q2_K"], kept)
        os.utime(original, (0, 0))
        stock_files(original, ["Q2_K"], kept)
        stock_files(original, ["Q2_K"], kept, pure=True)
        stock_files(original, ["Q3_K"], kept)
        stock_files(original, ["Q2_K"], kept, str(text))
        text.write_text(text.read_text("utf-8") + "more", "utf-8")
        stock_files(original, ["Q2_K"], kept, str(text))
        with original.open("ab") as file:
            file.write(bytes(1))
        os.utime(original, (0, 0))
        stock_files(original, ["Q2_K"], kept)
        assert len(made) == 8
        assert sorted(kept.iterdir()) == sorted(set(made)), "side by side"

    def test_files_of_others_are_left_alone(self, original: Path, tmp_path: Path, made: list[Path]) -> None:
        kept = tmp_path / "kept"
        kept.mkdir()
        (kept / "f16-Q2_K.gguf").write_text("mine")
        stock_files(original, ["Q2_K"], kept)
        made[0].write_text("mine, too, and no GGUF file")
        said = r"Q2_K-[0-9a-f]{16}.gguf has a stock file's name but isn't one \(.*\); remove it, or choose another dir"
        with pytest.raises(D2QError, match=said):
            stock_files(original, ["IQ2_XS", "Q2_K"], kept)
        assert made[0].read_text() == "mine, too, and no GGUF file"
        assert (kept / "f16-Q2_K.gguf").read_text() == "mine"
        made[0].unlink()
        made[0].mkdir()
        with pytest.raises(D2QError, match=said):
            stock_files(original, ["Q2_K"], kept)
        assert len(made) == 1

    def test_directory_without_write_permission(
        self, original: Path, tmp_path: Path, made: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Found out before anything is made; and what is there can be used."""
        kept = tmp_path / "kept"
        stock_files(original, ["Q2_K"], kept)

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(tempfile, "mkdtemp", refuse)
        said = r"^can't write to .*kept \(Permission denied\); choose another directory for the stock files$"
        with pytest.raises(D2QError, match=said):
            stock_files(original, ["Q2_K", "Q3_K"], kept)
        assert stock_files(original, ["Q2_K"], kept) == {"Q2_K": made[0]}
        assert len(made) == 1
        with pytest.raises(D2QError, match=r"can't write to .*f16.gguf \(File exists\); choose another directory"):
            stock_files(original, ["Q2_K"], original)


def test_types() -> None:
    assert parse_types("q2_k, IQ2_XS,,Q2_K") == ("Q2_K", "IQ2_XS")
    assert parse_types("") == ()
    with pytest.raises(D2QError, match=r"D2Q2 isn't a stock type that can be made; there are Q2_K, "):
        parse_types("Q2_K,d2q2")


def test_every_type_is_known_to_the_tool() -> None:
    said = subprocess.run([require_tool("llama-quantize"), "--help"], capture_output=True, text=True)
    for name in stock.TYPES:
        assert f" or  {name} " in (said.stdout + said.stderr), name


class TestFollowing:
    @pytest.fixture(autouse=True)
    def shell(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(following, "find_tool", lambda name: Path("/bin/sh"))

    def test_progress(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[tuple[int, int | None]] = []

        class Bar(tqdm):  # type: ignore[misc]
            def __init__(self, **options: object) -> None:
                super().__init__(**{**options, "disable": False, "file": open(os.devnull, "w")})  # noqa: SIM115, PTH123

            def update(self, n: float = 1) -> None:
                self.n += n
                seen.append((int(self.n), self.total))

        monkeypatch.setattr(following, "tqdm", Bar)
        script = "echo 'x: computing over 3 chunks'; sleep .1; printf '[1]4.2,'; sleep .1; printf '[2]4,[3]3.9,'"
        runtime.follow_tool("tool", "-c", script, what="a", unit="b")
        assert seen[0] == (1, 3) and seen[-1] == (3, 3)
        seen.clear()
        runtime.follow_tool("tool", "-c", "echo '[   7/ 291] blk.0'", what="a", unit="b")
        assert seen == [(7, 291)]

    def test_failure(self) -> None:
        with pytest.raises(D2QError, match=r"^sh failed \(exit code 3\): two three four$"):
            runtime.follow_tool(
                "tool", "-c", "echo one; echo two; echo; echo three >&2; echo four; exit 3", what="a", unit="b"
            )

    def test_silent_failure(self) -> None:
        with pytest.raises(D2QError, match=r"^sh failed \(exit code 4\): .*, run /bin/sh -c 'exit 4'$"):
            runtime.follow_tool("tool", "-c", "exit 4", what="a", unit="b")
        with pytest.raises(D2QError, match=r"^sh failed \(killed by SIGKILL\): "):
            runtime.follow_tool("tool", "-c", "kill -9 $$", what="a", unit="b")
