"""Finding what a conversion wrote about a file."""

import json
from pathlib import Path

import pytest

from d2q_edge.conversion_report import beside, find_report, read_report
from d2q_edge.errors import D2QError
from d2q_edge.gguf_reader import GGUFFile


@pytest.fixture
def file(tmp_path: Path) -> GGUFFile:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))
    return GGUFFile(path)


def report(path: Path, size: int, mark: str = "") -> Path:
    path.write_text(json.dumps({"bytes": size, "mark": mark}), "utf-8")
    return path


def test_beside_the_file(file: GGUFFile) -> None:
    assert find_report(file.path, file) is None
    report(file.path.with_name("a.gguf.json"), file.size, "own")
    found = find_report(file.path, file)
    assert found is not None and found["mark"] == "own"


@pytest.mark.parametrize("content", ['{"bytes": 23}', "{}", "[1]", "nonsense"])
def test_another_versions_report_beside_it(file: GGUFFile, content: str) -> None:
    beside(file.path).write_text(content)
    assert find_report(file.path, file) is None


def test_named(file: GGUFFile, tmp_path: Path) -> None:
    report(beside(file.path), file.size, "own")
    others = [report(tmp_path / "x.json", 99), report(tmp_path / "y.json", file.size, "named")]
    found = find_report(file.path, file, others)
    assert found is not None and found["mark"] == "named"


def test_named_and_bad(file: GGUFFile, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "bad.json").write_text("{")
    for name, said in (("none.json", "can't read"), ("list.json", "has no size"), ("bad.json", "isn't a report")):
        with pytest.raises(D2QError, match=rf"{name}.*|{said}") as caught:
            find_report(file.path, file, [tmp_path / name])
        assert said in str(caught.value)
    assert read_report(report(tmp_path / "good.json", 5)) == {"bytes": 5, "mark": ""}
