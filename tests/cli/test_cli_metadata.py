"""d2q-edge metadata: what it prints, what it changes, and wrong usage."""

import json
from pathlib import Path

import gguf
import pytest

from d2q_edge.export import metadata_edit
from d2q_edge.formats.gguf_reader import GGUFFile
from tests.command_line import Call, refused
from tests.gguf_files import finish


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(metadata_edit, "why_not", lambda _: None)
    path = tmp_path / "file.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("A=B")
    writer.add_uint32("x.number", 1)
    finish(writer)
    return path


def test_shows(d2q: Call, file: Path) -> None:
    kv = {"general.architecture": "llama", "general.name": "A=B", "x.number": 1}
    assert json.loads(d2q("metadata", file, "--json").out) == kv
    result = d2q("metadata", file)
    assert (result.code, result.err) == (0, "")
    assert [line.split() for line in result.out.splitlines()] == [
        ["general.architecture", "string", '"llama"'],
        ["general.name", "string", '"A=B"'],
        ["x.number", "uint32", "1"],
    ]


def test_changes(d2q: Call, file: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages }}\n")
    options = (
        "--set",
        "general.name=C=D",
        "--set",
        "x.new:uint8=3",
        "--remove",
        "x.number",
        "--chat-template",
        template,
    )
    before = file.read_bytes()
    result = d2q("metadata", file, *options, "-o", tmp_path / "out.gguf")
    size = (tmp_path / "out.gguf").stat().st_size
    assert (result.code, result.out) == (0, f"{tmp_path / 'out.gguf'}: {size:,} bytes\n")
    kv = {"general.architecture": "llama", "general.name": "C=D", "x.new": 3}
    kv["tokenizer.chat_template"] = "{{ messages }}\n"
    assert GGUFFile(tmp_path / "out.gguf").kv == kv
    assert file.read_bytes() == before
    refused(d2q("metadata", file, *options, "-o", tmp_path / "out.gguf"), "exists already; use --force")
    assert d2q("metadata", file, *options, "-o", tmp_path / "out.gguf", "--force").code == 0
    assert d2q("metadata", file, *options).code == 0
    assert GGUFFile(file).kv == kv


def test_refusals(d2q: Call, file: Path) -> None:
    refused(d2q("metadata", "none.gguf"), "there is no file none.gguf")
    refused(d2q("metadata", file, "--chat-template", "none.jinja"), "can't read none.jinja")
    refused(d2q("metadata", file, "--set", "x.number=a"), "its value must be a uint32")


@pytest.mark.parametrize(
    "options",
    [
        ("--set", "x.number"),
        ("--set", "=1"),
        ("--set", "x.number=1", "--set", "x.number=2"),
        ("--set", "tokenizer.chat_template=a", "--chat-template", __file__),
        ("--set", "x.number=1", "--json"),
        ("-o", "out.gguf"),
        ("--force",),
    ],
)
def test_wrong_usage(d2q: Call, file: Path, options: tuple[object, ...]) -> None:
    before = file.read_bytes()
    result = d2q("metadata", file, *options)
    assert result.code == 2
    assert "Usage: " in result.err
    assert file.read_bytes() == before
    assert list(Path.cwd().iterdir()) == []
