"""A conversion never replaces what it reads, nor one of its files by another one, also with --force."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from d2q_edge.errors import D2QError
from d2q_edge.export.targets import check_targets
from tests.command_line import Result

Make = Callable[..., Path]
QUICK = ("--calibration-tokens", "512", "--context", "32", "--force")


def stopped(result: Result, fragment: str) -> None:
    assert result.code == 1
    assert result.err.count("\n") == 1 and fragment in result.err


@pytest.mark.parametrize("options", [QUICK, ("--no-calibration", "--force"), ("--type", "f16", "--force")], ids=str)
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_the_model(d2q: Callable[..., Result], make_checkpoint: Make, file: str, options: tuple[str, ...]) -> None:
    model = make_checkpoint()
    content = (model / file).read_bytes()
    Path("link").symlink_to(model / file)
    for name in (model / file, "link"):
        stopped(d2q("convert", model, "-o", name, *options), "belongs to the model and won't be replaced")
    assert (model / file).read_bytes() == content


def test_an_earlier_file_beside_the_model(d2q: Callable[..., Result], make_checkpoint: Make) -> None:
    model = make_checkpoint()
    for _ in range(2):
        assert d2q("convert", model, "-o", model / "out.gguf", "--no-calibration", "--force").code == 0


def test_the_calibration_text(d2q: Callable[..., Result], make_checkpoint: Make) -> None:
    text = Path("text.txt")
    text.write_text("Some text. " * 1000)
    result = d2q("convert", make_checkpoint(), "-o", text, "--calibration", text, *QUICK)
    stopped(result, "text.txt, belongs to what is read and won't be replaced")
    assert text.read_text().startswith("Some text.")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--report", "out.gguf"), "the output and the report are the same file"),
        (("--report", "./../here/out.gguf"), "the output and the report are the same file"),
        (("--report", "README.md", "--model-card"), "the report and the model card are the same file"),
    ],
)
def test_each_other(
    d2q: Callable[..., Result], make_checkpoint: Make, more: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    stopped(d2q("convert", make_checkpoint(), "-o", "out.gguf", *QUICK, *more), message)
    assert list(Path.cwd().iterdir()) == []


def test_reports(d2q: Callable[..., Result], make_checkpoint: Make) -> None:
    """Only --force replaces one, and nothing lets one replace a part of the model."""
    model, notes = make_checkpoint(), Path("notes.json")
    notes.write_text("mine")
    command = ("convert", model, "-o", "out.gguf", "--no-calibration", "--report")
    stopped(d2q(*command, notes), "notes.json exists already; use --force to replace it")
    assert notes.read_text() == "mine"
    stopped(d2q(*command, model / "config.json", "--force"), "belongs to the model")
    assert d2q(*command, notes, "--force").code == 0
    assert notes.read_text().startswith("{")


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_what_is_no_file(d2q: Callable[..., Result], make_checkpoint: Make, kind: str) -> None:
    target = Path("/dev/null") if kind == "device" else Path("pipe").absolute()
    if kind == "fifo":
        os.mkfifo(target)
    before = target.stat()
    for options in (QUICK, ("--type", "f16", "--force")):
        stopped(
            d2q("convert", make_checkpoint(name=f"x{len(options)}"), "-o", target, *options), "isn't a regular file"
        )
    assert target.stat().st_mode == before.st_mode and target.stat().st_ino == before.st_ino


def test_by_hand(tmp_path: Path) -> None:
    (tmp_path / "a.json").touch()
    (tmp_path / "old.gguf").touch()
    check_targets({"x": tmp_path / "old.gguf", "y": tmp_path / "b.json"}, tmp_path)
    check_targets({"x": tmp_path / "a.json"}, tmp_path / "none")
    with pytest.raises(D2QError, match=rf"^x, {tmp_path}/a.json, belongs to the model and won't be replaced; choose"):
        check_targets({"x": tmp_path / "a.json"}, tmp_path)
    with pytest.raises(D2QError, match=r"belongs to what is read"):
        check_targets({"x": tmp_path / "old.gguf"}, tmp_path / "none", [tmp_path / "sub" / ".." / "old.gguf"])
