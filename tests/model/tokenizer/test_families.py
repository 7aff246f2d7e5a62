"""Test every family's tokenizer: keys against llama.cpp's converter, ids in llama.cpp against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from d2q_edge.export.tokenizer_check import text_gaps, verify
from d2q_edge.model.tokenizer import read_tokenizer
from d2q_edge.runtime.llama_model import LlamaVocabulary
from tests.availability import require_runtime
from tests.checkpoints import EXAMPLE
from tests.model.tokenizer.families import FAMILIES, SENTENCEPIECE
from tests.model.tokenizer.texts import AWKWARD, CASED, CORPUS, MARKED
from tests.model.tokenizer.vocabulary_file import convert_vocabularies, tokenizer_keys, write_vocabulary
from tests.paths import ROOT

SHARED = ROOT.parent / "shared" / "models"
RECORDS_SPACE_PREFIX = ("LlamaForCausalLM", "MistralForCausalLM", "SmolLM3ForCausalLM")
TEXTS = [*AWKWARD, *MARKED, *CASED, *CORPUS[:16]]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: family.write(root / name) for name, family in FAMILIES.items()}


@pytest.fixture(scope="module")
def stock_files(
    directories: dict[str, Path], pristine_tree: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    models = {directory: FAMILIES[name].pre for name, directory in directories.items()}
    return convert_vocabularies(pristine_tree / "vendor/llama.cpp", models, tmp_path_factory.mktemp("stock"))


class Pair:
    """A model's tokenizer in llama.cpp and in transformers."""

    def __init__(self, directory: Path, vocab_size: int, file: Path) -> None:
        self.tokenizer = read_tokenizer(directory, {"eos_token_id": 2}, vocab_size)
        self.llama = LlamaVocabulary(write_vocabulary(file, self.tokenizer))
        self.reference: Any = PreTrainedTokenizerFast.from_pretrained(directory)

    def differ(self, text: str) -> bool:
        return self.llama.tokenize(text, read_special=True) != list(self.reference.encode(text))


@pytest.fixture(scope="module")
def pairs(directories: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    require_runtime()
    out = tmp_path_factory.mktemp("ours")
    return {
        name: Pair(directory, FAMILIES[name].vocab_size, out / f"{name}.gguf")
        for name, directory in directories.items()
    }


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.slow
def test_keys_like_stock(directories: dict[str, Path], stock_files: dict[str, Path], tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    tokenizer = read_tokenizer(directories[name], family.config(), family.vocab_size)
    recorded = family.architecture in RECORDS_SPACE_PREFIX
    ours = tokenizer_keys(write_vocabulary(tmp_path / "ours.gguf", tokenizer, space_prefix=recorded))
    assert ours == tokenizer_keys(stock_files[name])
    assert dict(ours)["tokenizer.ggml.pre"] == family.pre


@pytest.mark.parametrize("name", FAMILIES)
def test_same_ids(pairs: dict[str, Pair], name: str) -> None:
    """Texts outside of the known gaps have the same ids, and every known gap shows in some text."""
    pair = pairs[name]
    seen: set[str] = set()
    for text in TEXTS:
        gaps = text_gaps(text) & pair.tokenizer.gaps
        gaps |= {"special"} & pair.tokenizer.gaps if "<s>" in text else frozenset()
        if pair.differ(text):
            assert gaps, text
            seen |= gaps
    assert seen == pair.tokenizer.gaps - ({"special"} if FAMILIES[name].base else set())


@pytest.mark.parametrize("name", FAMILIES)
def test_special_tokens_in_text(pairs: dict[str, Pair], name: str) -> None:
    pair = pairs[name]
    for text in FAMILIES[name].added:
        token = text.replace("\u2581", " ")
        assert not pair.differ(token), token
        if "special" not in pair.tokenizer.gaps:
            assert not pair.differ(f"one {token}two\n{token} {token}three"), token


@pytest.mark.parametrize("name", ["llama2", "gemma3", "tekken", "smollm2", "phi4", "olmoe"])
def test_any_text(pairs: dict[str, Pair], name: str) -> None:
    pair = pairs[name]
    letters = st.sampled_from("aAéÉßжЖ中ไ\u0e31\u0301 12٣½\n\r\t\u00a0'sSmtT.,!-_/(▁Ġ\u200d🚀\0")
    pieces = st.one_of(
        letters, st.characters(codec="utf-8", max_codepoint=0x1FFFF, categories=("L", "N", "P", "S", "Z"))
    )

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(st.text(pieces, max_size=24))
    def check(text: str) -> None:
        if text_gaps(text) & pair.tokenizer.gaps or (name == "gemma3" and "▁" in text):
            return
        assert not pair.differ(text)

    check()


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_json_alone(directories: dict[str, Path], pairs: dict[str, Pair], tmp_path: Path, name: str) -> None:
    """Scores reconstructed from merges lead to the same ids as those of tokenizer.model."""
    family = FAMILIES[name]
    alone = Pair(family.write(tmp_path / name, keep=("json",)), family.vocab_size, tmp_path / "alone.gguf")
    assert alone.tokenizer.tokens == pairs[name].tokenizer.tokens
    assert alone.tokenizer.types == pairs[name].tokenizer.types
    for text in TEXTS:
        ids = alone.llama.tokenize(text, read_special=True)
        assert ids == pairs[name].llama.tokenize(text, read_special=True), text


@pytest.mark.parametrize("name", FAMILIES)
def test_verify_accepts(
    directories: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    require_runtime()
    tokenizer = read_tokenizer(directories[name], FAMILIES[name].config(), FAMILIES[name].vocab_size)
    verify(write_vocabulary(tmp_path / "ours.gguf", tokenizer), directories[name], tokenizer)
    message = capsys.readouterr().err
    assert message.count("\n") == bool(tokenizer.gaps)
    assert message.startswith("llama.cpp is known to tokenize some text" if tokenizer.gaps else "")


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_verify_accepts_a_sentencepiece_model_alone(tmp_path: Path, name: str) -> None:
    require_runtime()
    family = FAMILIES[name]
    directory = family.write(tmp_path / name, keep=("model",))
    tokenizer = read_tokenizer(directory, family.config(), family.vocab_size)
    verify(write_vocabulary(tmp_path / "ours.gguf", tokenizer), directory, tokenizer)


@pytest.mark.parametrize("name", ["tiny-qwen3", "qwen3-34m", "llama-54m"])
def test_real_models(tmp_path: Path, name: str) -> None:
    require_runtime()
    directory = EXAMPLE if name == "tiny-qwen3" else SHARED / name
    if not directory.is_dir():
        pytest.skip(f"{directory} isn't here")
    pair = Pair(directory, 4096 if name == "tiny-qwen3" else 16384, tmp_path / "model.gguf")
    different = {text for text in TEXTS if pair.differ(text)}
    assert all("decomposed" in text_gaps(text) & pair.tokenizer.gaps for text in different)
