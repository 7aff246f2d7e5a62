"""The import contract: it holds, and a wrong import breaks it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT


def lint(directory: Path) -> "subprocess.CompletedProcess[str]":
    """Check the contract for the package in a directory."""
    command = [
        str(Path(sys.executable).with_name("lint-imports")),
        "--config",
        str(ROOT / "pyproject.toml"),
        "--no-cache",
    ]
    return subprocess.run(command, capture_output=True, text=True, cwd=directory, env={"PYTHONPATH": str(directory)})


def test_the_contract_holds() -> None:
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout
    assert "2 kept, 0 broken" in result.stdout


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        (
            "quantize/rtn.py",
            "from d2q_edge.model import checkpoint",
            "quantize is not allowed to import d2q_edge.model",
        ),
        ("formats/tensor_types.py", "from d2q_edge.cli import main", "formats is not allowed to import d2q_edge.cli"),
        ("quantize/gptaq.py", "import d2q_edge.distributed", "quantize is not allowed to import d2q_edge.distributed"),
        ("new_module.py", "", "new_module"),
    ],
    ids=["upwards", "far upwards", "processes", "outside the layers"],
)
def test_a_wrong_import_breaks_it(tmp_path: Path, file: str, line: str, broken: str) -> None:
    shutil.copytree(ROOT / "d2q_edge", tmp_path / "d2q_edge", ignore=shutil.ignore_patterns("__pycache__", "data"))
    path = tmp_path / "d2q_edge" / file
    path.write_text((path.read_text() if path.exists() else "") + f"\n{line}\n")
    result = lint(tmp_path)
    assert result.returncode == 1
    assert broken in result.stdout, result.stdout
