"""Edited files: llama.cpp and gguf-py read the new values, everything else is what it was, and nothing breaks."""

import os
import stat
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from d2q_edge.errors import D2QError
from d2q_edge.export import metadata_edit
from d2q_edge.export.metadata_edit import describe, edit, read_template, type_name
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.runtime.chat import TEMPLATE_KEY
from d2q_edge.runtime.llama_model import LlamaVocabulary
from d2q_edge.utils import files
from tests.availability import require_runtime
from tests.conftest import ExampleFiles
from tests.gguf_files import finish
from tests.interruption import interrupted

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}ü"


@pytest.fixture
def stock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of gguf-py's with a key of every type and an unusual alignment, which llama.cpp isn't asked to load."""
    monkeypatch.setattr(metadata_edit, "why_not", lambda _: "not a model")
    path = tmp_path / "stock.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(128)
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{kind}")(f"x.{kind}", 7)
    writer.add_float32("x.float32", 0.5)
    writer.add_float64("x.float64", 0.25)
    writer.add_bool("x.bool", False)
    writer.add_string("x.string", "old")
    writer.add_array("x.words", ["a", "b"])
    writer.add_array("x.numbers", [1, 2])
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    writer.add_uint32("tokenizer.ggml.eos_token_id", 1)
    for name, size in (("b", 5), ("a", 300)):
        writer.add_tensor(name, np.arange(size, dtype=np.float32))
    finish(writer)
    return path


def data(path: Path) -> dict[str, bytes]:
    file = GGUFFile(path)
    return {name: file.raw(name).tobytes() for name in file.tensors}


def test_values_keep_their_types(stock: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    before, content = GGUFFile(stock), stock.read_bytes()
    changes = {f"x.{kind}": "9" for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")}
    changes |= {
        "x.float32": "2",
        "x.float64": "1e-3",
        "x.bool": "True",
        "x.string": "[1] new\nline",
        TEMPLATE_KEY: TEMPLATE,
    }
    changes |= {"x.words": '["c"]', "x.numbers": "[4, 5, 6]", "tokenizer.ggml.eos_token_id": "2"}
    assert edit(stock, changes, output=out) == out.stat().st_size
    assert stock.read_bytes() == content
    after, reader = GGUFFile(out), gguf.GGUFReader(out)
    assert reader.alignment == 128
    expected = {**before.kv, **dict.fromkeys(list(changes)[:8], 9), "x.float32": 2.0, "x.float64": 1e-3, "x.bool": True}
    expected |= {"x.string": "[1] new\nline", "x.words": ["c"], "x.numbers": [4, 5, 6], TEMPLATE_KEY: TEMPLATE}
    expected["tokenizer.ggml.eos_token_id"] = 2
    assert after.kv == expected
    assert list(after.kv) == [*before.kv, TEMPLATE_KEY]
    # Read by somebody else: values, types, tensors.
    for key in changes:
        assert reader.fields[key].contents() == expected[key]
        assert [kind.name.lower() for kind in reader.fields[key].types][-1] == type_name(after, key).partition("[")[0]
    for key in before.kv:
        assert type_name(before, key).partition("[")[0] == type_name(after, key).partition("[")[0]
    assert [(tensor.name, tensor.data.tolist()) for tensor in reader.tensors] == [
        (tensor.name, tensor.data.tolist()) for tensor in gguf.GGUFReader(stock).tensors
    ]
    assert data(out) == data(stock)


@pytest.mark.parametrize(
    ("key", "text", "type_", "value"),
    [
        ("x.new", "3", "uint32", 3),
        ("x.new", "-3", "int32", -3),
        ("x.new", "4294967296", "uint64", 2**32),
        ("x.new", "0.5", "float32", 0.5),
        ("x.new", "true", "bool", True),
        ("x.new", "a word", "string", "a word"),
        ("x.new", '{"a": 1}', "string", '{"a": 1}'),
        ("x.new", "[1, 2]", "uint32[2]", [1, 2]),
        ("x.new:uint8", "3", "uint8", 3),
        ("x.new:string", "3", "string", "3"),
        ("x.new:float64", "3", "float64", 3.0),
        ("general.version", "1.5", "string", "1.5"),
        ("general.tags", '["a", "b"]', "string[2]", ["a", "b"]),
        ("general.sampling.temp", "0.5", "float32", 0.5),
        ("general.base_model.count", "2", "uint32", 2),
        (TEMPLATE_KEY, "true", "string", "true"),
    ],
)
def test_new_keys(stock: Path, key: str, text: str, type_: str, value: object) -> None:
    edit(stock, {key: text})
    after, name = GGUFFile(stock), key.partition(":")[0]
    assert (type_name(after, name), after.kv[name]) == (type_, value)
    assert gguf.GGUFReader(stock).fields[name].contents() == value


def test_removed_keys_may_come_back_with_another_type(stock: Path) -> None:
    before = data(stock)
    edit(stock, {"x.string:uint32": "3"}, ["x.string", "x.words"])
    after = GGUFFile(stock)
    assert (type_name(after, "x.string"), after.kv["x.string"]) == ("uint32", 3)
    assert "x.words" not in after.kv
    assert data(stock) == before


@pytest.mark.parametrize(
    ("changes", "removals", "message"),
    [
        ({"x.uint8": "256"}, [], "x.uint8 can't become '256': its value must be a uint8"),
        ({"x.int8": "1.5"}, [], "must be a int8"),
        ({"x.uint32": "true"}, [], "must be a uint32"),
        ({"x.float32": "1e39"}, [], "must be a float32"),
        ({"x.float32": "nan"}, [], "must be a float32"),
        ({"x.float64": "1e400"}, [], "must be a float64"),
        ({"x.bool": "1"}, [], "must be a bool"),
        ({"x.string": "a\0b"}, [], "must be a string"),
        ({"x.string": "\udcff"}, [], "must be a string"),
        ({"x.words": "c"}, [], "must be a JSON list of string items"),
        ({"x.words": "[1]"}, [], "must be a JSON list of string items"),
        ({"x.words": "[]"}, [], "must be a JSON list of string items"),
        ({"x.words": "[" * 100_000}, [], "must be a JSON list of string items"),
        ({"x.uint32": "9" * 5000}, [], "must be a uint32"),
        ({"x.new": '[1, "a"]'}, [], "the items of an array must be of one simple type"),
        ({"x.new": "[[1]]"}, [], "the items of an array must be of one simple type"),
        ({"x.new:word": "1"}, [], "there is no type 'word'; these are: uint8, "),
        ({"x.new:array": "1"}, [], "there is no type 'array'"),
        ({"x.uint8:string": "1"}, [], "x.uint8 is of the type uint8, not string; to change that, remove the key"),
        ({"a b": "1"}, [], "'a b' can't be a key"),
        ({"\x1b[2J": "1"}, [], "can't be a key"),
        ({"general.architecture": "qwen3"}, [], "can't be changed in a finished file"),
        ({"general.architecture:string": "qwen3"}, [], "can't be changed in a finished file"),
        ({"general.alignment": "32"}, [], "can't be changed in a finished file"),
        ({"llama.block_count": "1"}, [], "can't be changed in a finished file"),
        ({"d2q.recipe": "{}"}, [], "can't be changed in a finished file"),
        ({"tokenizer.ggml.tokens": '["a"]'}, [], "says the vocabulary, and can't be changed"),
        ({}, ["tokenizer.ggml.tokens"], "says the vocabulary, and can't be changed"),
        ({}, ["general.alignment"], "can't be changed in a finished file"),
        ({}, ["x.none"], "has no key x.none"),
        ({"tokenizer.ggml.eos_token_id": "3"}, [], "the vocabulary has 3 tokens"),
        ({TEMPLATE_KEY: "{% for %}"}, [], "the new tokenizer.chat_template isn't a valid template: Expected"),
        ({TEMPLATE_KEY: "{{ " + "(" * 10_000}, [], "isn't a valid template"),
    ],
)
def test_refusals(stock: Path, changes: dict[str, str], removals: list[str], message: str) -> None:
    before = stock.read_bytes()
    with pytest.raises(D2QError) as refusal:
        edit(stock, changes, removals)
    assert message in str(refusal.value)
    assert stock.read_bytes() == before
    assert [path.name for path in stock.parent.iterdir()] == ["stock.gguf"]


def test_a_file_for_llama_cpp(example_files: ExampleFiles, tmp_path: Path) -> None:
    """llama.cpp loads it, shows the new template, and what it couldn't load isn't written."""
    require_runtime()
    out = tmp_path / "out.gguf"
    edit(example_files.d2q2, {TEMPLATE_KEY: TEMPLATE, "general.name": "New"}, output=out)
    assert data(out) == data(example_files.d2q2)
    with LlamaVocabulary(out) as model:
        assert model.chat_template.render({"messages": [{"role": "user", "content": "Hi"}]}) == "<user>Hiü"
    before = out.read_bytes()
    with pytest.raises(D2QError, match=r"with these changes llama.cpp couldn't load the file: .*rms_epsilon"):
        edit(out, {}, ["qwen3.attention.layer_norm_rms_epsilon"])
    with pytest.raises(D2QError, match=r"with these changes llama.cpp couldn't load the file"):
        edit(out, {"tokenizer.ggml.pre": "no such"})
    assert out.read_bytes() == before


def test_the_file_keeps_its_mode(stock: Path, tmp_path: Path) -> None:
    stock.chmod(0o640)
    edit(stock, {"x.string": "new"})
    assert stat.S_IMODE(stock.stat().st_mode) == 0o640
    edit(stock, {"x.string": "new"}, output=tmp_path / "out.gguf")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "out.gguf").stat().st_mode) == 0o666 & ~umask


def test_outputs(stock: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("other")
    for output in (out, stock):
        with pytest.raises(D2QError, match="exists already; use --force to replace it"):
            edit(stock, {"x.string": "new"}, output=output)
    assert out.read_text() == "other"
    edit(stock, {"x.string": "new"}, output=out, force=True)
    assert GGUFFile(out).kv["x.string"] == "new"
    link = tmp_path / "link.gguf"
    link.symlink_to(stock)
    with pytest.raises(D2QError, match=r"link.gguf is a link to .*stock.gguf: name that file, or write another one"):
        edit(link, {"x.string": "new"})
    assert GGUFFile(stock).kv["x.string"] == "old"


@pytest.mark.parametrize(("place", "function"), [(metadata_edit, "_check_loads"), (files, "sync")])
def test_an_interrupted_edit_leaves_the_file(stock: Path, place: object, function: str) -> None:
    before = stock.read_bytes()
    with interrupted(place, function, 0):
        edit(stock, {"x.string": "new"})
    assert stock.read_bytes() == before
    assert [path.name for path in stock.parent.iterdir()] == ["stock.gguf"]


def test_the_new_file_reaches_the_disk_before_its_name(stock: Path, disk_events: list[tuple[str, str]]) -> None:
    edit(stock, {"x.string": "new"})
    assert disk_events == [("flush", ".stock.gguf.partial"), ("rename", "stock.gguf"), ("flush", stock.parent.name)]


def test_a_file_with_an_absurd_alignment(tmp_path: Path) -> None:
    """It must not be taken at its word in memory."""
    path = tmp_path / "a.gguf"
    key = b"general.alignment"
    path.write_bytes(struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, len(key)) + key + struct.pack("<II", 4, 2**31))
    edit(path, {"x.new": "1"})
    assert GGUFFile(path).kv == {"general.alignment": 2**31, "x.new": 1}
    assert path.stat().st_size < 200


def test_mutated_files_are_edited_or_refused(stock: Path, tmp_path: Path) -> None:
    good, path, out = stock.read_bytes(), tmp_path / "bad.gguf", tmp_path / "out.gguf"
    rng = np.random.default_rng(0)
    edited = 0
    for _ in range(300):
        content = bytearray(good)
        for position in rng.integers(0, 800, rng.integers(1, 4)):
            content[position] = int(rng.integers(256))
        path.write_bytes(content)
        try:
            edit(path, {"x.another": "1"}, output=out, force=True)
        except D2QError:
            continue
        edited += 1
        assert data(out) == data(path)
        # Not by ==: a mutated float may be NaN.
        before, after = GGUFFile(path).raw_values, GGUFFile(out).raw_values
        assert {key: bytes(value) for key, value in after.items() if key != "x.another"} == {
            key: bytes(value) for key, value in before.items()
        }
    assert 30 < edited < 300


def test_description(stock: Path) -> None:
    edit(stock, {"x.string": "\x1b[2J" + 500 * "a", TEMPLATE_KEY: TEMPLATE})
    lines = {line.split()[0]: line.split(None, 2)[1:] for line in describe(GGUFFile(stock)).splitlines()}
    assert lines["x.float32"] == ["float32", "0.5"]
    assert lines["x.numbers"] == ["int32[2]", "[1, 2]"]
    assert lines["tokenizer.ggml.tokens"] == ["string[3]", '["a", "b", "c"]']
    assert lines["x.string"][1].startswith('"\\u001b[2Jaaa')
    assert lines["x.string"][1].endswith("aaa...")
    assert len(lines["x.string"][1]) < 220


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff", "isn't UTF-8"), (bytes(2**20 + 1), "is larger than"), (None, "can't read")],
)
def test_template_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "template.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(D2QError, match=message):
        read_template(path)
