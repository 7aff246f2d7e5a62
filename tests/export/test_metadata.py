"""Model cards as people write them: nothing in one stops a conversion, and what can be kept is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from d2q_edge.export.metadata import general_metadata
from d2q_edge.export.model_file import export
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.model.families import family_for
from d2q_edge.runtime.llama_model import LlamaVocabulary

Make = Callable[..., Path]


@pytest.fixture
def convert(make_checkpoint: Make, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """convert(front matter, generation_config=None, **of config.json): the general.* keys of the F16 file."""

    def run(card: str, generation: Any = None, **config: Any) -> dict[str, Any]:
        model = make_checkpoint("llama")
        (model / "README.md").write_text(f"---\n{card}\n---\n# A model\n")
        if generation is not None:
            (model / "generation_config.json").write_text(json.dumps(generation))
        if config:
            settings = json.loads((model / "config.json").read_text())
            (model / "config.json").write_text(json.dumps({**settings, **config}))
        export(model, tmp_path / "out.gguf", "f16", force=True, verify=False)
        with LlamaVocabulary(tmp_path / "out.gguf"):
            pass
        kv = GGUFFile(tmp_path / "out.gguf").kv
        return {key.removeprefix("general."): kv[key] for key in kv if key.startswith("general.")}

    return run


PLAIN = {"architecture", "type", "name", "size_label", "file_type", "quantization_version"}


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("author: [Alice, Bob]", {"author": "Alice,Bob"}),
        ("model_creator:\n- Carol", {"author": "Carol"}),
        ("license: [mit, apache-2.0]", {"license": "mit,apache-2.0"}),
        ("url: [https://a.b]", {"source.url": "https://a.b"}),
        ("model_type: [llama]", {"basename": "llama"}),
        ("version: 1.0", {"version": "1.0"}),
        ("model_name: 7", {"name": "7"}),
        ("license: 2024-01-01", {"license": "2024-01-01"}),
        ("description: no", {"description": "no"}),
        ("language: [en, no, 1]", {"languages": ["en", "no", "1"]}),
        ("tags: [llama, 2024, 3.1, yes]", {"tags": ["llama", "2024", "3.1", "yes"]}),
        ("tags: [llama, null, [a, b], {c: d}]", {"tags": ["llama", "a,b"]}),
        (
            "base_model: [a/b-7B, {name: C, version: 2, extra: null}]",
            {
                "base_model.count": 2,
                "base_model.0.name": "B 7B",
                "base_model.0.organization": "A",
                "base_model.0.repo_url": "https://huggingface.co/a/b-7B",
                "base_model.1.name": "C",
                "base_model.1.version": "2",
            },
        ),
        ("base_model: [null]", {"base_model.count": 1}),
        ("datasets: [1]", {"dataset.count": 1}),
    ],
)
def test_values_of_other_kinds(
    convert: Callable[..., dict[str, Any]], card: str, expected: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    found = convert(card)
    assert {key: found.get(key) for key in expected} == expected
    assert found.keys() - PLAIN == expected.keys() - PLAIN
    assert "not in a known format" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"top_k": 50.0, "top_p": 1}, {"sampling.top_k": 50, "sampling.top_p": 1.0}),
        ({"temperature": "0.6", "top_k": 20}, {"sampling.top_k": 20}),
        ({"top_k": 50.5, "temperature": True, "min_p": 0.5}, {"sampling.min_p": 0.5}),
        ({"top_k": 2**40, "top_p": float("nan"), "repetition_penalty": 2}, {"sampling.penalty_repeat": 2.0}),
        ([1], {}),
    ],
)
def test_generation_settings(
    convert: Callable[..., dict[str, Any]],
    generation: Any,
    expected: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = convert("license: mit", generation)
    assert {key: found[key] for key in found if key.startswith("sampling")} == expected
    if "temperature" in generation:
        said = capsys.readouterr().err
        assert (
            f"goes without the model's sampling_temp, which isn't what it should be: {generation['temperature']!r}"
            in said
        )
        assert said.count("sampling_temp") == 1


@pytest.mark.parametrize("card", ["license: [unclosed", "description: a: b", "license: {{ license }}"])
def test_card_that_is_no_yaml(
    convert: Callable[..., dict[str, Any]], card: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = convert(card, {"temperature": 0.5})
    assert found.keys() == PLAIN | {"sampling.temp"}
    assert found["name"] == "Tiny" and found["sampling.temp"] == 0.5
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "README.md" in line)
    assert "can't be read (" in line and line.endswith("; the file goes without what they say")


@pytest.mark.parametrize(
    ("card", "name", "expected"),
    [
        ("license: mit", 5, "Tiny"),
        ("", "Org/Great-Model-7B", "Great Model 7B"),
        ("license: [", "Org/Great-Model-7B", "Great Model 7B"),
    ],
)
def test_name_in_the_config(convert: Callable[..., dict[str, Any]], card: str, name: Any, expected: str) -> None:
    assert convert(card, _name_or_path=name)["name"] == expected


def test_a_good_card_has_no_notes(make_checkpoint: Make) -> None:
    model = make_checkpoint("llama")
    (model / "README.md").write_text("---\nlicense: mit\ntags: [a]\nlanguage:\n- en\n- no\nbase_model: a/b\n---\n")
    checkpoint = Checkpoint.open(model)
    metadata, notes = general_metadata(checkpoint, family_for(checkpoint.config).parameters(), quantized=True)
    assert notes == []
    assert (metadata.license, metadata.tags, metadata.languages) == ("mit", ["a"], ["en", "no"])
