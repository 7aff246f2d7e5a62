"""Reports of conversions: format, fingerprint, and finding the one that belongs to a file."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from d2q_edge.conversion import convert
from d2q_edge.errors import D2QError
from d2q_edge.evaluation.report.page import page
from d2q_edge.export.conversion_report import (
    FORMAT,
    PIECE,
    beside,
    find_report,
    fingerprint,
    read_report,
)
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.options import Options
from tests.checkpoints import EXAMPLE
from tests.conftest import ExampleFiles
from tests.evaluation.report.comparisons import comparison, conversion

SHIFT = conversion()["norm_shifts"]["model.layers.0.post_attention_layernorm"]


@pytest.fixture
def file(tmp_path: Path) -> GGUFFile:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))
    return GGUFFile(path)


def report(path: Path, size: int, mark: str = "", **more: Any) -> Path:
    path.write_text(json.dumps({"bytes": size, "mark": mark, **more}), "utf-8")
    return path


def test_beside_the_file(file: GGUFFile) -> None:
    assert find_report(file.path, file) is None
    report(file.path.with_name("a.gguf.json"), file.size, "own")
    found = find_report(file.path, file)
    assert found is not None and found["mark"] == "own"


@pytest.mark.parametrize("content", ['{"bytes": 23}', "{}", "[1]", "nonsense"])
def test_unusable_report_beside_it(file: GGUFFile, content: str) -> None:
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


class TestFingerprint:
    def test_of_what(self, tmp_path: Path) -> None:
        """The size, and the first, middle and last MiB; of a file below three, all of it."""
        path = tmp_path / "x"
        content = bytes(range(251)) * 20000
        path.write_bytes(content)
        size = len(content)
        middle = (size - PIECE) // 2
        pieces = content[:PIECE] + content[middle : middle + PIECE] + content[-PIECE:]
        assert fingerprint(path) == hashlib.sha256(b"%d\n" % size + pieces).hexdigest()
        for length in (0, 1, PIECE, 2 * PIECE + 1, 3 * PIECE):
            seen = set()
            for changed in (None, *(range(0, length, PIECE // 2)), length - 1):
                values = bytearray(length)
                if changed is not None and length:
                    values[changed] = 1
                path.write_bytes(values)
                seen.add((fingerprint(path), bytes(values)))
            assert len({value for value, _ in seen}) == len(seen), length
        with pytest.raises(D2QError, match=r"can't read .*none: No such file"):
            fingerprint(tmp_path / "none")

    def test_conversions_of_other_seeds(self, file: GGUFFile, tmp_path: Path) -> None:
        """Files of the same size, each with its own report."""
        other = tmp_path / "b.gguf"
        other.write_bytes(file.path.read_bytes()[:-1] + b"\1")
        named = [
            report(tmp_path / f"{path.name}.report", file.size, path.name, fingerprint=fingerprint(path))
            for path in (other, file.path)
        ]
        for path in (file.path, other):
            for order in (named, named[::-1]):
                found = find_report(path, file, order)
                assert found is not None and found["mark"] == path.name
        assert find_report(file.path, file, named[:1]) is None
        beside(file.path).write_bytes(named[0].read_bytes())
        assert find_report(file.path, file) is None, "the file has been converted again since"

    def test_reports_without_a_fingerprint(self, file: GGUFFile, tmp_path: Path) -> None:
        """Without a fingerprint, the size has to do, unless another report is surely about the file."""
        older = report(tmp_path / "older.json", file.size, "older")
        found = find_report(file.path, file, [older])
        assert found is not None and found["mark"] == "older"
        report(beside(file.path), file.size, "own", fingerprint=fingerprint(file.path))
        found = find_report(file.path, file, [older])
        assert found is not None and found["mark"] == "own"


class TestFormat:
    def test_number_comes_first(self, tmp_path: Path) -> None:
        planned = convert(EXAMPLE, tmp_path / "out.gguf", Options(calibrate=False), dry_run=True)
        assert next(iter(planned.to_json().items())) == ("format", FORMAT) == ("format", 2)

    def test_current(self, tmp_path: Path) -> None:
        values = {"format": FORMAT, **conversion(), "bytes": 5}
        (tmp_path / "x.json").write_text(json.dumps(values))
        assert read_report(tmp_path / "x.json") == values
        with pytest.raises(D2QError, match="its validation can't be what convert"):
            read_report(report(tmp_path / "y.json", 5, format=FORMAT, validation=0.5))

    def test_first_format_says_held_back(self, tmp_path: Path) -> None:
        values = {**conversion(), "bytes": 5}
        older = {"held_back" if key == "validation" else key: value for key, value in values.items()}
        assert "validation" not in older
        (tmp_path / "x.json").write_text(json.dumps(older))
        assert read_report(tmp_path / "x.json") == values
        with pytest.raises(D2QError, match="its validation can't be what convert"):
            read_report(report(tmp_path / "y.json", 5, held_back=0.5))

    @pytest.mark.parametrize("number", [3, "2", None, [], 0])
    def test_unknown(self, tmp_path: Path, number: Any) -> None:
        with pytest.raises(D2QError, match=r"x.json has a format that this version of d2q-edge doesn't know; update"):
            read_report(report(tmp_path / "x.json", 5, format=number))


class TestMalformed:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("fingerprint", 5),
            ("types", ["d2q2"]),
            ("types", {"a": 2}),
            ("layer_errors", 5),
            ("layer_errors", {"a": "0.5"}),
            ("layer_errors", {"a": None}),
            ("layer_errors", {"a": 10**400}),
            ("layer_errors", {"a": -1e300}),
            ("column_scales", {"a": 1.0}),
            ("column_scales", {"a": {"minimum": 0, "p05": 1, "median": 1, "p95": 1}}),
            ("norm_shifts", "much"),
            ("norm_shifts", {"a": {**SHIFT, "gain": []}}),
            ("norm_shifts", {"a": {name: value for name, value in SHIFT.items() if name != "applied"}}),
            ("validation", {"tokens": 2}),
            ("validation", 0.5),
            ("seconds", {"solve": "long"}),
        ],
    )  # fmt: skip
    def test_fields(self, tmp_path: Path, field: str, value: Any) -> None:
        path = report(tmp_path / "x.json", 5, **{**conversion(), "bytes": 5, field: value})
        with pytest.raises(D2QError, match=f"^{path} isn't a report of convert: its {field} can't be what convert"):
            read_report(path)

    def test_nesting(self, tmp_path: Path) -> None:
        (tmp_path / "x.json").write_text("[" * 100_000)
        with pytest.raises(D2QError, match=r"x.json isn't a report of convert: nested too deep"):
            read_report(tmp_path / "x.json")

    @pytest.mark.slow
    def test_what_convert_writes_is_read(self, example_files: ExampleFiles, tmp_path: Path) -> None:
        for values in (conversion(), {"bytes": 7, **example_files.reports[2].to_json()}):
            (tmp_path / "x.json").write_text(json.dumps(values))
            assert read_report(tmp_path / "x.json") == values

    def test_whatever_is_read_can_be_shown(self, tmp_path: Path) -> None:
        """Null and missing fields, numbers that aren't finite, names that say nothing."""
        names = ["3", "", "x", "model.layers.0", "9" * 5000 + ".x", "a.1.$\\foo$", "a.1._b", "a.1.\ud800", "a.\u0661.é"]
        numbers = [0.5, math.nan, math.inf, -1e30, 0, 1e30, -math.inf, 7, 1e-300]
        fields: dict[str, Any] = {
            "types": dict.fromkeys(names, "d2q2"),
            "layer_errors": dict(zip(names, numbers, strict=True)),
            "column_scales": {
                name: dict.fromkeys(("minimum", "p05", "median", "p95", "maximum"), number)
                for name, number in zip(names, numbers, strict=True)
            },
            "norm_shifts": {
                name: dict.fromkeys(("norm", "relative_norm", "signal_to_noise", "gain", "channels"), number)
                | {"applied": True}
                for name, number in zip(names, numbers, strict=True)
            },
            "validation": {"tokens": 1, "kl_divergence": math.nan, "kl_divergence_stderr": math.inf},
            "seconds": {"solve": math.inf},
        }
        for shown in (fields, dict.fromkeys(fields), {}, {**fields, "types": None}):
            path = tmp_path / "x.json"
            path.write_text(json.dumps({"bytes": 5, **shown}))
            original = comparison()
            conversion_ = original.rows[3].conversion
            assert isinstance(conversion_, dict)
            conversion_.clear()
            conversion_.update(read_report(path))
            assert "Inside mine" in page(original)
