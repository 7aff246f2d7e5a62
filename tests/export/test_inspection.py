"""Summaries of files of ours, stock files, and odd ones."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from d2q_edge import runtime
from d2q_edge.errors import D2QError
from d2q_edge.export import inspection
from d2q_edge.export.inspection import describe, inspect, part_of
from d2q_edge.formats.codebooks import TABLE_SHA256
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.runtime import trial_load
from tests.availability import require_runtime
from tests.conftest import ExampleFiles
from tests.gguf_files import finish

Make = Callable[..., Path]
KEYS = [
    "file", "architecture", "name", "bytes", "parameters", "bits_per_weight", "types", "norm_biases", "recipe",
    "table_sha256", "parts", "metadata_bytes", "layers", "biased_norms", "context_length", "base_model", "license",
    "quantized_by", "split", "runtime",
]  # fmt: skip
# The example: 4 blocks of q 256x256, k and v 128x256, o 256x256, gate, up and down 768x256; embeddings 4096x256; per
# block 2 norms of 256 and 2 of 64, and the last norm. Five of the norms have a bias in our file.
LINEAR = 4 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 768 * 256)
NORMS = 4 * (2 * 256 + 2 * 64) + 256
BIASES = 5 * 256


def summarize(path: Path) -> dict[str, Any]:
    """Inspect a file without the trial load, which takes a second."""
    return inspect(path, try_to_load=False)


def write(path: Path, *, architecture: str = "llama", **text: str) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tensor("a_norm.weight", np.zeros(32, np.float32))
    writer.add_tensor("a_norm.bias", np.zeros(32, np.float32))
    for key, value in text.items():
        writer.add_string(key.replace("__", "."), value)
    finish(writer)
    return path


@pytest.mark.slow
def test_own_file(example_files: ExampleFiles) -> None:
    summary = summarize(example_files.d2q2)
    assert list(summary) == KEYS
    assert summary["file"] == str(example_files.d2q2)
    assert (summary["architecture"], summary["name"]) == ("qwen3", "Tiny Qwen3")
    assert summary["bytes"] == example_files.d2q2.stat().st_size
    assert summary["parameters"] == LINEAR + NORMS + BIASES + 4096 * 256
    assert summary["types"] == {
        "q5_k": {"tensors": 1, "bytes": 4096 * 256 * 176 // 256, "elements": 4096 * 256},
        "d2q2": {"tensors": 28, "bytes": LINEAR * 74 // 256, "elements": LINEAR},
        "f32": {"tensors": 22, "bytes": (NORMS + BIASES) * 4, "elements": NORMS + BIASES},
    }
    assert list(summary["types"]) == ["d2q2", "q5_k", "f32"], "largest first"
    assert summary["bits_per_weight"] == 8 * sum(t["bytes"] for t in summary["types"].values()) / summary["parameters"]
    assert summary["norm_biases"] == 5
    assert (summary["recipe"]["bits"], summary["recipe"]["method"]) == (2, "gptaq")
    assert summary["table_sha256"] == TABLE_SHA256
    assert summary["parts"] == {
        "blocks": {
            "tensors": 28 + 16 + 4,
            "bytes": LINEAR * 74 // 256 + (NORMS + BIASES - 512) * 4,
            "elements": LINEAR + NORMS + BIASES - 512,
        },
        "embeddings": summary["types"]["q5_k"],
        "head": {"tensors": 0, "bytes": 0, "elements": 0},
        "other": {"tensors": 2, "bytes": 2 * 256 * 4, "elements": 2 * 256},
    }
    assert summary["metadata_bytes"] + sum(part["bytes"] for part in summary["parts"].values()) == summary["bytes"]
    assert summary["biased_norms"] == {"ffn_norm": 4, "output_norm": 1}
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    assert summary["layers"] == {matrix: {"d2q2": 4} for matrix in matrices}
    assert summary["context_length"] == 2048
    assert str(summary["quantized_by"]).startswith("d2q-edge ")
    assert summary["split"] is None


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("blk.0.attn_q.weight", "blocks"),
        ("blk.31.ffn_down_exps.weight", "blocks"),
        ("enc.blk.3.attn_q.weight", "blocks"),
        ("v.blk.3.attn_q.weight", "blocks"),
        ("token_embd.weight", "embeddings"),
        ("token_embd_norm.weight", "other"),
        ("position_embd.weight", "embeddings"),
        ("output.weight", "head"),
        ("output.bias", "head"),
        ("cls.output.weight", "head"),
        ("output_norm.weight", "other"),
        ("rope_freqs.weight", "other"),
    ],
)
def test_parts(name: str, part: str) -> None:
    assert part_of(name) == part


def test_stock_file(example_files: ExampleFiles) -> None:
    summary = summarize(example_files.f16)
    assert list(summary) == KEYS
    assert summary["types"].keys() == {"f16", "f32"}
    assert summary["recipe"] is summary["table_sha256"] is None
    assert "recipe" not in describe(summary)
    # gguf-py's own reader.
    tensors = gguf.GGUFReader(example_files.f16).tensors
    assert sum(entry["bytes"] for entry in summary["types"].values()) == sum(int(t.n_bytes) for t in tensors)
    assert summary["parameters"] == sum(int(t.n_elements) for t in tensors)


@pytest.mark.slow
def test_files_of_any_architecture(pristine_tree: Path) -> None:
    """llama.cpp's own test files: real tokenizers and keys of many models, and no tensors."""
    files = sorted((pristine_tree / "vendor/llama.cpp/models").glob("*.gguf"), key=lambda path: path.stat().st_size)
    assert len(files) > 10
    for path in files[:2]:
        summary = summarize(path)
        assert list(summary) == KEYS
        assert summary["bytes"] == summary["metadata_bytes"] == path.stat().st_size
        expected = gguf.GGUFReader(path).fields["general.architecture"].contents()
        assert summary["architecture"] == expected
        assert expected in describe(summary)


def test_one_part_of_a_split_file(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_uint16("split.no", 1)
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    summary = summarize(tmp_path / "a.gguf")
    assert summary["split"] == {"part": 2, "of": 3}
    assert "part 2 of 3 of a split file" in describe(summary)


def test_mixed_types(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    for block, kind in enumerate((np.float16, np.float32, np.float16)):
        writer.add_tensor(f"blk.{block}.attn_v.weight", np.zeros((2, 32), kind))
        writer.add_tensor(f"blk.{block}.ffn_norm.weight", np.zeros(32, np.float32))
    finish(writer)
    summary = summarize(tmp_path / "a.gguf")
    assert summary["layers"] == {"attn_v": {"f16": 2, "f32": 1}}
    assert "  attn_v: 2 x f16, 1 x f32" in describe(summary).splitlines()
    assert inspection.allocation(GGUFFile(tmp_path / "a.gguf")) == {"attn_v": {0: "f16", 1: "f32", 2: "f16"}}


class TestRuntime:
    def test_tries_files_that_it_can_run(self, example_files: ExampleFiles) -> None:
        require_runtime()
        for path in (example_files.d2q2, example_files.f16):
            summary = inspect(path)
            assert summary["runtime"] == {"version": runtime.info().version, "runs": True, "reason": None}
            assert describe(summary).splitlines()[-1].endswith("can run it")

    def test_tries_files_that_it_cannot_run(self, example_files: ExampleFiles, tmp_path: Path) -> None:
        require_runtime()
        content = example_files.d2q2.read_bytes()
        missing = tmp_path / "missing.gguf"
        missing.write_bytes(content.replace(b"blk.3.attn_q.weight", b"blk.3.attn_x.weight"))
        other = tmp_path / "tables.gguf"
        other.write_bytes(content.replace(TABLE_SHA256.encode(), b"0" * 64, 1))
        unknown = write(tmp_path / "unknown.gguf", architecture="nosuch")
        for path, said in ((missing, "blk.3.attn_q.weight"), (other, "codebook tables"), (unknown, "nosuch")):
            summary = inspect(path)
            assert summary["runtime"]["runs"] is False
            assert said in summary["runtime"]["reason"], summary["runtime"]
            assert said in describe(summary).splitlines()[-1]

    def test_tries_what_makes_it_crash(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        code = "import os,sys; print('x.cpp:1: GGML_ASSERT(false) failed', file=sys.stderr); os.abort()"
        start = subprocess.run
        monkeypatch.setattr(subprocess, "run", lambda command, **options: start([command[0], "-c", code], **options))
        assert trial_load.why_not(tmp_path) == (
            "llama.cpp crashes when it loads the file: x.cpp:1: GGML_ASSERT(false) failed"
        )

    def test_tries_without_a_runtime(self, example_files: ExampleFiles, no_runtime: None) -> None:
        assert "is not installed: run `d2q-edge runtime install`" in str(trial_load.attempt(example_files.f16))

    def test_is_not_asked(self, example_files: ExampleFiles) -> None:
        summary = inspect(example_files.f16, try_to_load=False)
        assert summary["runtime"] == {"version": None, "runs": None, "reason": None}
        assert "runtime" not in describe(summary)


@pytest.mark.parametrize("recipe", ["{", "[1]", '"text"'])
def test_odd_files(tmp_path: Path, recipe: str) -> None:
    summary = summarize(write(tmp_path / "a.gguf", d2q__recipe=recipe))
    assert summary["norm_biases"] == 1
    assert summary["name"] is summary["recipe"] is None
    assert describe(summary).startswith(f"{tmp_path / 'a.gguf'}: unnamed (llama)\n")


def test_file_without_tensors(tmp_path: Path) -> None:
    path = tmp_path / "empty.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))
    summary = summarize(path)
    assert (summary["parameters"], summary["bits_per_weight"], summary["types"]) == (0, 0.0, {})
    assert "unknown architecture" in describe(summary)


def test_description(example_files: ExampleFiles) -> None:
    lines = describe(summarize(example_files.d2q2)).splitlines()
    assert lines[0].endswith("d2q2.gguf: Tiny Qwen3 (qwen3)")
    assert lines[1].startswith(f"{example_files.d2q2.stat().st_size:,} bytes, 4,198,400 parameters, 3.1")
    assert lines[3].split() == ["type", "tensors", "bytes", "bits/weight", "share"]
    assert lines[4].split()[:4] == ["d2q2", "28", "909,312", "2.3125"]
    assert [line.split()[0] for line in lines[8:13]] == ["part", "blocks", "embeddings", "other", "keys"]
    shares = [float(line.split()[-1].rstrip("%")) for line in lines[9:13]]
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert lines[13] == "the embeddings serve as the head, too"
    assert "norm biases: 4 x ffn_norm, 1 x output_norm" in lines
    assert any(line.startswith("recipe: bits 2, method gptaq, ") for line in lines)
    assert len({len(line) for line in [*lines[3:7], *lines[8:13]]}) == 1, "columns line up"


def test_untrusted_names_do_not_control_the_terminal(tmp_path: Path) -> None:
    text = describe(summarize(write(tmp_path / "a.gguf", general__name="a\x1b[2Jb\nc")))
    assert text.startswith(f"{tmp_path / 'a.gguf'}: a\\x1b[2Jb\\nc (llama)\n")


def test_not_a_gguf(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("something else, long enough for a header")
    with pytest.raises(D2QError, match="isn't a GGUF file"):
        summarize(tmp_path / "a")
