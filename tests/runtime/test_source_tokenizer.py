"""The tokenizer of a GGUF source in llama.cpp against that of the checkpoint in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2q_edge.errors import D2QError
from d2q_edge.export.model_file import export
from d2q_edge.model.checkpoint import Checkpoint
from d2q_edge.runtime.source_tokenizer import FileTokenizer, source_tokenizer
from tests.availability import require_runtime
from tests.gguf_files import changed


@pytest.fixture(scope="module")
def file(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "chat.gguf"
    export(chat_model, path, "f16", verify=False)
    return path


def test_like_transformers(chat_model: Path, file: Path) -> None:
    require_runtime()
    original, found = (source_tokenizer(Checkpoint.open(path)) for path in (chat_model, file))
    assert isinstance(found, FileTokenizer)
    for words in ("<|im_start|>USER: Hello<|im_end|>\n", "Two words, 1234 and\n\n  some <|im_end|> more."):
        expected = original(words, add_special_tokens=False, verbose=False)["input_ids"]
        assert found(words, add_special_tokens=False, verbose=False)["input_ids"] == expected
    assert found("a")["input_ids"] == original("a")["input_ids"]


def test_without_the_runtime(file: Path, no_runtime: None) -> None:
    with pytest.raises(
        D2QError, match=r"only llama.cpp has the tokenizer of .*chat.gguf, but the runtime .* is not installed"
    ):
        source_tokenizer(Checkpoint.open(file))


def test_a_vocabulary_on_which_llama_cpp_aborts(file: Path, tmp_path: Path) -> None:
    """It would end this process, if it weren't loaded in another one first."""
    require_runtime()
    tokens = ["same"] * 4096
    path = changed(file, tmp_path / "x.gguf", {"tokenizer.ggml.tokens": tokens})
    with pytest.raises(D2QError, match=r"llama.cpp can't load .*x.gguf: llama.cpp crashes"):
        source_tokenizer(Checkpoint.open(path))
