"""Model cards: read back by the hub's own library; what they say is what the file is."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from huggingface_hub import ModelCard

from d2q_edge.errors import D2QError
from d2q_edge.export.inspection import inspect
from d2q_edge.export.model_card import check_card, model_card, write_card
from tests.conftest import ExampleFiles
from tests.gguf_files import finish

REPORT: dict[str, Any] = {
    "validation": {"tokens": 2048, "kl_divergence": 0.21234, "kl_divergence_stderr": 0.0054, "top1_agreement": 0.8125},
    "refinement": {"scope": "model", "before": 0.21, "after": 0.19},
}


def write(path: Path, **keys: Any) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Some: Model")
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((2, 32), np.float16))
    for key, value in keys.items():
        add = writer.add_array if isinstance(value, list) else writer.add_string
        add(f"general.{key.replace('__', '.')}", value)
    finish(writer)
    return path


@pytest.mark.slow
def test_of_our_file(example_files: ExampleFiles) -> None:
    text = model_card(example_files.d2q2, REPORT)
    card: Any = ModelCard(text)
    data = card.data.to_dict()
    assert data.get("library_name") == "gguf"
    assert data.get("pipeline_tag") == "text-generation"
    assert data["quantized_by"] == "d2q-edge"
    assert set(data.get("tags") or []) == {"gguf", "d2q-edge", "quantized", "d2q2"}
    assert data.get("base_model") is None, "nobody knows what it was made of"
    summary = inspect(example_files.d2q2, try_to_load=False)
    assert f"# Tiny Qwen3 in {summary['bits_per_weight']:.2f} bits per weight" in card.content
    assert f"| d2q2.gguf | {summary['bytes']:,} | {summary['bits_per_weight']:.3f} |" in card.content
    for name, entry in summary["types"].items():
        assert f"| {name} | {entry['tensors']} | {entry['bytes']:,} |" in card.content
    assert "our types (d2q2), which stock llama.cpp and programs built on it refuse to load" in card.content
    assert "d2q-edge chat d2q2.gguf" in card.content
    assert "on 2,048 tokens of calibration text kept for validation: **0.2123** ± 0.0054" in card.content
    assert "the same in 81.2% of them" in card.content
    assert "from 0.2100 to 0.1900" in card.content
    assert f"| calibration_sha256 | {summary['recipe']['calibration_sha256']} |" in card.content
    assert text.endswith("\n") and not text.endswith("\n\n")


def test_of_a_file_that_knows_where_it_is_from(tmp_path: Path) -> None:
    keys = {
        "license": "other",
        "license__name": "its: own",
        "license__link": "https://example.org/terms",
        "languages": ["en", "de"],
        "base_model__0__repo_url": "https://huggingface.co/someone/Some-Model/tree/main",
    }
    card: Any = ModelCard(model_card(write(tmp_path / "a.gguf", **keys), {}))
    data = card.data.to_dict()
    assert data.get("base_model") == "someone/Some-Model"
    assert data["base_model_relation"] == "quantized"
    assert (data.get("license"), data.get("license_name")) == ("other", "its: own")
    assert data.get("license_link") == "https://example.org/terms"
    assert data.get("language") == ["en", "de"]
    assert data.get("tags") == ["gguf", "d2q-edge", "quantized"]
    assert "[someone/Some-Model](https://huggingface.co/someone/Some-Model)" in card.content
    assert "kept for validation" not in card.content
    assert "stock llama.cpp" not in card.content
    assert "How it was made" not in card.content


def test_a_file_elsewhere(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", base_model__0__repo_url="https://example.org/x/y", license="mit")
    card: Any = ModelCard(model_card(path, {}))
    data = card.data.to_dict()
    assert data.get("base_model") is None
    assert data.get("license") == "mit"


class TestWriting:
    def test_beside_the_file(self, example_files: ExampleFiles, tmp_path: Path) -> None:
        output = tmp_path / "d2q2.gguf"
        output.write_bytes(example_files.d2q2.read_bytes())
        check_card(output, force=False)
        assert write_card(output, REPORT) == tmp_path / "README.md"
        assert (tmp_path / "README.md").read_text("utf-8") == model_card(output, REPORT)
        with pytest.raises(D2QError, match=r"README.md exists already; use --force to replace it"):
            check_card(output, force=False)
        check_card(output, force=True)

    @pytest.mark.parametrize("content", [b"# My project\n", b"\xff\xfe", b""])
    def test_never_over_somebody_elses(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "README.md").write_bytes(content)
        for force in (False, True):
            with pytest.raises(D2QError, match="isn't a model card of d2q-edge; write the file into a directory"):
                check_card(tmp_path / "a.gguf", force=force)
        assert (tmp_path / "README.md").read_bytes() == content

    def test_unwritable(self, example_files: ExampleFiles, tmp_path: Path) -> None:
        output = tmp_path / "d2q2.gguf"
        output.write_bytes(example_files.d2q2.read_bytes())
        (tmp_path / "README.md").mkdir()
        with pytest.raises(D2QError, match="isn't a model card"):
            check_card(output, force=True)
        with pytest.raises(D2QError, match=r"can't write .*README.md"):
            write_card(output, REPORT)
