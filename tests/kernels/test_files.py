"""Files that the patched reader accepts, and that the stock one refuses with its own message."""

import ctypes
import subprocess
from pathlib import Path

import pytest

from d2q_edge.formats.codebooks import TABLE_SHA256
from d2q_edge.formats.tensor_types import ALL, D2Q2, TensorType
from d2q_edge.runtime import source
from tests.kernels.ggml import SUFFIX, Ggml
from tests.kernels.gguf_bytes import one_tensor_file
from tests.kernels.gguf_init import accepts

# the sources of the GGUF reader
READER = ("ggml.c", "ggml-alloc.c", "ggml-quants.c", "ggml-backend.cpp", "ggml-backend-meta.cpp", "ggml-threading.cpp")


def _file(directory: Path, type_id: int, columns: int, size: int) -> Path:
    path = directory / f"type-{type_id}.gguf"
    path.write_bytes(one_tensor_file(type_id, columns, 1, bytes(size)))
    return path


def test_tables_are_numpys(ggml: Ggml) -> None:
    assert ggml.base.ggml_d2q_table_sha256().decode() == TABLE_SHA256


@pytest.mark.parametrize("t", ALL, ids=lambda t: t.name)
def test_own_types_are_read(ggml: Ggml, t: TensorType, tmp_path: Path) -> None:
    assert accepts(ggml.base, _file(tmp_path, t.id, t.block_size, t.type_size))


@pytest.mark.parametrize("type_id", [43, 60, 79, 84, 200])
def test_gaps_in_the_numbering_are_refused(
    ggml: Ggml, type_id: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert not accepts(ggml.base, _file(tmp_path, type_id, 256, D2Q2.type_size))
    assert f"tensor 'weight' has invalid ggml type {type_id}" in capfd.readouterr().err


@pytest.fixture(scope="module")
def stock(pristine_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Compile the unpatched reader, without optimization."""
    ggml = pristine_tree / "vendor/llama.cpp/ggml"
    work = tmp_path_factory.mktemp("stock")
    (work / "ggml-version.h").write_text('#define GGML_VERSION ""\n#define GGML_COMMIT ""\n')
    objects = []
    for name in (*READER, "gguf.cpp", "ggml-opt.cpp", "ggml.cpp"):
        compiler = ["gcc", "-std=gnu11"] if name.endswith(".c") else ["g++", "-std=gnu++17"]
        flags = ["-O0", "-w", "-fPIC", "-D_GNU_SOURCE", "-DGGML_SCHED_MAX_COPIES=4"]
        includes = [f"-I{ggml / 'include'}", f"-I{ggml / 'src'}", f"-I{work}"]
        objects.append(str(work / f"{name}.o"))
        subprocess.run([*compiler, *flags, *includes, "-c", ggml / "src" / name, "-o", objects[-1]], check=True)
    library = work / f"libggml-base{SUFFIX}"
    subprocess.run(["g++", "-shared", "-o", library, *objects], check=True)
    return ctypes.CDLL(str(library))


def test_stock_ggml_refuses_our_types(stock: ctypes.CDLL, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert accepts(stock, _file(tmp_path, 0, 256, 1024))
    for t in ALL:
        assert not accepts(stock, _file(tmp_path, t.id, t.block_size, t.type_size))
        assert f"tensor 'weight' has invalid ggml type {t.id}. should be in [0, 43)" in capfd.readouterr().err


def test_version_of_the_patched_package(patched_tree: Path) -> None:
    assert f'__version__ = "{source.runtime_version()}"' in (patched_tree / "llama_cpp/__init__.py").read_text()
