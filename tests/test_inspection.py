"""What inspect says about files of ours, stock files, and files with things that it can't know."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from d2q_edge.codebooks import TABLE_SHA256
from d2q_edge.errors import D2QError
from d2q_edge.inspection import describe, inspect
from tests.conftest import ExampleFiles

Make = Callable[..., Path]
KEYS = [
    "file", "architecture", "name", "bytes", "parameters", "bits_per_weight", "types", "norm_biases", "recipe",
    "table_sha256",
]  # fmt: skip
# The example: 4 blocks of q 256x256, k and v 128x256, o 256x256, gate, up and down 768x256; embeddings 4096x256; per
# block 2 norms of 256 and 2 of 64, and the last norm. Five of the norms have a bias in our file.
LINEAR = 4 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 768 * 256)
NORMS = 4 * (2 * 256 + 2 * 64) + 256
BIASES = 5 * 256


def write(path: Path, **text: str) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("a_norm.weight", np.zeros(32, np.float32))
    writer.add_tensor("a_norm.bias", np.zeros(32, np.float32))
    for key, value in text.items():
        writer.add_string(key.replace("__", "."), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_own_file(example_files: ExampleFiles) -> None:
    facts = inspect(example_files.d2q2)
    assert list(facts) == KEYS
    assert facts["file"] == str(example_files.d2q2)
    assert (facts["architecture"], facts["name"]) == ("qwen3", "Tiny Qwen3")
    assert facts["bytes"] == example_files.d2q2.stat().st_size
    assert facts["parameters"] == LINEAR + NORMS + BIASES + 4096 * 256
    assert facts["types"] == {
        "q5_k": {"tensors": 1, "bytes": 4096 * 256 * 176 // 256, "elements": 4096 * 256},
        "d2q2": {"tensors": 28, "bytes": LINEAR * 74 // 256, "elements": LINEAR},
        "f32": {"tensors": 22, "bytes": (NORMS + BIASES) * 4, "elements": NORMS + BIASES},
    }
    assert list(facts["types"]) == ["d2q2", "q5_k", "f32"], "largest first"
    assert facts["bits_per_weight"] == 8 * sum(t["bytes"] for t in facts["types"].values()) / facts["parameters"]
    assert facts["norm_biases"] == 5
    assert (facts["recipe"]["bits"], facts["recipe"]["method"]) == (2, "gptaq")
    assert facts["table_sha256"] == TABLE_SHA256


def test_stock_file(example_files: ExampleFiles) -> None:
    facts = inspect(example_files.f16)
    assert list(facts) == KEYS
    assert facts["types"].keys() == {"f16", "f32"}
    assert facts["recipe"] is facts["table_sha256"] is None
    assert "recipe" not in describe(facts)


@pytest.mark.parametrize("recipe", ["{", "[1]", '"text"'])
def test_odd_files(tmp_path: Path, recipe: str) -> None:
    facts = inspect(write(tmp_path / "a.gguf", d2q__recipe=recipe))
    assert facts["norm_biases"] == 1
    assert facts["name"] is facts["recipe"] is None
    assert describe(facts).startswith(f"{tmp_path / 'a.gguf'}: unnamed (llama)\n")


def test_file_without_tensors(tmp_path: Path) -> None:
    path = tmp_path / "empty.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))
    facts = inspect(path)
    assert (facts["parameters"], facts["bits_per_weight"], facts["types"]) == (0, 0.0, {})
    assert "unknown architecture" in describe(facts)


def test_description(example_files: ExampleFiles) -> None:
    lines = describe(inspect(example_files.d2q2)).splitlines()
    assert lines[0].endswith("d2q2.gguf: Tiny Qwen3 (qwen3)")
    assert lines[1].startswith(f"{example_files.d2q2.stat().st_size:,} bytes, 4,198,400 parameters, 3.1")
    assert lines[3].split() == ["type", "tensors", "bytes", "bits/weight"]
    assert lines[4].split() == ["d2q2", "28", "909,312", "2.3125"]
    assert lines[-1].startswith("recipe: bits 2, method gptaq, ")
    assert len({len(line) for line in lines[3:7]}) == 1, "columns line up"


def test_not_a_gguf(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("something else, long enough for a header")
    with pytest.raises(D2QError, match="isn't a GGUF file"):
        inspect(tmp_path / "a")
