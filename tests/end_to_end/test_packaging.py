"""Wheel and source distribution: what is in them, and that an installed one works away from the source tree."""

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from email.parser import HeaderParser
from pathlib import Path

import pytest

from d2q_edge import __version__
from d2q_edge.runtime import source
from d2q_edge.utils.machine import cache_key
from tests.availability import unavailable
from tests.checkpoints import EXAMPLE
from tests.paths import ROOT

SMOKE = """
import sys
import d2q_edge
from d2q_edge.cli import cli
assert d2q_edge.__file__.startswith(sys.prefix), d2q_edge.__file__
model = sys.argv[1]
for line in (
    f"convert {model} -o out.gguf --no-calibration",
    "inspect out.gguf --json",
    "eval out.gguf --chunks 1 --context 32 --json",
    "run out.gguf -p Once -n 4 --threads 1",
):
    print("$", line, flush=True)
    cli.main(line.split(), standalone_mode=False)
"""


def run(command: Sequence[str | Path], cwd: Path) -> str:
    """What a program prints on stdout; nothing of this test run's environment leads back to the source tree."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution, and the wheel that is built from it."""
    if importlib.util.find_spec("hatchling") is None:
        unavailable("hatchling is missing: pip install -e '.[dev]'")
    out = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", out], ROOT)
    sdist = next(out.glob("*.tar.gz"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    run([*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", out, sdist], out)
    return sdist, next(out.glob("*.whl"))


def _tracked(*folders: str) -> set[str]:
    """Files under version control; empty where this is no checkout."""
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True)
    return set(listed.stdout.split())


def test_wheel(distributions: tuple[Path, Path]) -> None:
    _, wheel = distributions
    assert wheel.name == f"d2q_edge-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"d2q_edge-{__version__}.dist-info"
        metadata = HeaderParser().parsestr(archive.read(f"{info}/METADATA").decode())
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert archive.read(f"{info}/entry_points.txt").decode().split("\n")[1] == "d2q-edge = d2q_edge.cli:main"
    assert {"d2q_edge/py.typed", "d2q_edge/formats/codebooks.txt", "d2q_edge/data/calibration/prose.txt"} <= names
    content = {name for name in names if not name.startswith(info)}
    package = _tracked("d2q_edge") | {f"d2q_edge/{name}" for name in _tracked("cpp_patch")}
    if package:
        assert content == package
    assert (metadata["Name"], metadata["License-Expression"]) == ("d2q-edge", "MIT")
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra", ())) >= {"report", "dev"}
    assert str(metadata.get_payload()).startswith("# d2q-edge")


def test_sdist(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    # everything that the README's two commands need
    assert {"Makefile", "constraints.txt", "LICENSE", "tools/demo.py", "tests/cli/test_cli.py"} <= names
    assert {f"examples/tiny-qwen3/{file.name}" for file in EXAMPLE.iterdir()} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith((".ci", ".git/"))]


@pytest.fixture(scope="module")
def environment(distributions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, and with everything that this one has but us and the runtime."""
    root = tmp_path_factory.mktemp("clean")
    venv.create(root / "venv", with_pip=False, symlinks=True)
    packages = root / "packages"
    packages.mkdir()
    for folder in (Path(entry) for entry in sys.path if entry.endswith("site-packages")):
        for path in folder.iterdir():
            own = path.name.lower().startswith(("d2q_edge", "_editable_impl_d2q", "__editable__", "llama_cpp"))
            if not own and path.suffix != ".pth" and not (packages / path.name).exists():
                (packages / path.name).symlink_to(path)
    site = next((root / "venv").glob("lib*/python*/site-packages"))
    (site / "packages.pth").write_text(f"{packages}\n")
    python = root / "venv/bin/python"
    pip = ["-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--no-index"]
    run([python, *pip, distributions[1]], root)
    return root


def test_installed(environment: Path) -> None:
    programs, script = environment / "venv/bin", environment / "smoke.py"
    assert run([programs / "d2q-edge", "--version"], environment) == f"d2q-edge, version {__version__}\n"
    wheels = source.cache_directory() / cache_key(source.patch_hash()) / "wheel"
    if not list(wheels.glob("*.whl")):
        unavailable("the runtime isn't in the cache: run `d2q-edge runtime install`")
    version = run([programs / "d2q-edge", "runtime", "install"], environment).strip()
    assert version == source.runtime_version(), "of the same patch, which came with the wheel"
    key = "from d2q_edge.runtime import tools; print(tools.installed_key())"
    assert run([programs / "python", "-I", "-c", key], environment).strip() == wheels.parent.name, "as pip has noted"
    script.write_text(SMOKE)
    said = run([programs / "python", "-I", script, EXAMPLE], environment)
    convert, inspect, evaluate, text = (part.partition("\n")[2] for part in said.split("$ ")[1:])
    size = (environment / "out.gguf").stat().st_size
    assert convert.startswith(f"out.gguf: {size:,} bytes")
    assert json.loads(inspect)["bytes"] == json.loads(evaluate)["bytes"] == size
    assert text.startswith("Once")
