"""Compiling the C sources: once per machine, never at import, and again where the file in the cache is no good."""

import ctypes
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from d2q_edge.formats.tensor_types import D2Q2_64, Q4_0
from d2q_edge.quantize import native
from d2q_edge.quantize.codebook_search import CodebookSearch
from d2q_edge.quantize.native import library as module
from d2q_edge.quantize.rtn import round_layer
from tests.paths import ROOT

CPU = torch.device("cpu")


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source that compiles in no time; returns its directory."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "answer.c").write_text("int answer(void) { return 42; }\n")
    monkeypatch.setattr(module, "SOURCES", sources)
    return sources


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache, and a process that has loaded nothing; returns the cache's directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    module.library.cache_clear()
    yield tmp_path / "cache/d2q-edge/native"
    module.library.cache_clear()


def loaded(directory: Path) -> Path:
    """Load the small library and return its only file."""
    assert module.load(directory).answer() == 42
    (path,) = directory.iterdir()
    return path


def test_it_is_compiled_once(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = loaded(tmp_path / "cache")
    monkeypatch.setenv("PATH", "")
    assert loaded(tmp_path / "cache") == path


def test_other_sources_flags_and_machines_have_other_files(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module.load(tmp_path)
    (small / "answer.c").write_text("int answer(void) { return 43; }\n")
    assert module.load(tmp_path).answer() == 43
    monkeypatch.setattr(module, "FLAGS", (*module.FLAGS, "-g0"))
    module.load(tmp_path)
    monkeypatch.setattr("d2q_edge.utils.machine._cpu", lambda: "another CPU")
    module.load(tmp_path)
    assert len(list(tmp_path.glob("*.so"))) == 4


@pytest.mark.parametrize("damage", [lambda data: data[:2000], lambda data: data[:-1] + b"?", lambda _: b""])
def test_a_damaged_file_is_made_again(small: Path, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    directory = tmp_path / "cache"
    path = loaded(directory)
    data = path.read_bytes()
    # A new file, as the process has this one loaded.
    path.unlink()
    path.write_bytes(damage(data))
    assert loaded(directory).read_bytes() == data


def test_a_file_of_another_system_is_made_again(small: Path, tmp_path: Path) -> None:
    """It has the right name, as if it had been copied, but can't be loaded."""
    directory = tmp_path / "cache"
    path = loaded(directory)
    other = directory / "other"
    other.write_bytes(b"\x7fELF of another system")
    path.unlink()
    key = path.name.rpartition("-")[0]
    other.rename(directory / module._file_name(key, other))
    assert loaded(directory) == path


def test_without_a_cache(small: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    assert module.load(tmp_path / "file" / "cache").answer() == 42


def test_the_cache_is_whole_or_empty(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted copy leaves nothing under the library's name."""

    def interrupt(_source: Path, _target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.copyfile", interrupt)
    with pytest.raises(KeyboardInterrupt):
        module.load(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("program", "reason"), [(None, "none is installed"), ("broken", "broken fails"), ("no", "none")]
)
def test_without_a_compiler_it_is_torch(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], program: str | None, reason: str
) -> None:
    programs = fresh.parent / "programs"
    programs.mkdir(parents=True)
    broken = programs / "broken"
    broken.write_text("#!/bin/sh\necho 'x.c:1: error: stdint.h is missing' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}")
    monkeypatch.setenv("CC", program or "")
    assert not native.is_available(D2Q2_64, CPU)
    assert not native.is_available(D2Q2_64, CPU)
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and said.startswith("Quantizing takes several times as long without a C compiler (")
    assert reason in said
    weights = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    layer = round_layer(weights, CodebookSearch(D2Q2_64))
    assert float((layer.weights - weights).square().mean()) < 0.1
    assert not fresh.exists()


def test_the_second_compiler_is_tried_where_the_first_one_fails(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "COMPILERS", ("false", "cc"))
    loaded(tmp_path / "cache")


def test_the_library_has_all_kernels() -> None:
    found = module.library()
    assert isinstance(found, ctypes.CDLL)
    for name in ("search", "block_scales", "nearest", "quantize_block", "choose_block"):
        assert hasattr(found, f"d2q_{name}")
    for name in native.__all__:
        assert callable(getattr(native, name))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = native.nonsense


def test_what_the_kernels_do() -> None:
    assert native.is_available(D2Q2_64, CPU)
    assert not native.is_available(Q4_0, CPU)
    assert not native.is_available(D2Q2_64, torch.device("cuda"))


def test_nothing_is_compiled_at_import(fresh: Path) -> None:
    code = "from d2q_edge.quantize import descent; from d2q_edge.quantize.codebook_search import CodebookSearch"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert not fresh.exists()
