"""The memory table: parameters as published, bytes as in a real file, the KV cache as in llama.cpp's log."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.model.families import family_for
from tests.checkpoints import EXAMPLE
from tests.conftest import ExampleFiles
from tests.paths import ROOT
from tests.real_configs import REAL
from tools import phone_table
from tools.phone_table import Need

MODELS = json.loads(phone_table.MODELS.read_text("utf-8"))
MORE = {
    "SmolLM2-1.7B": 1_711_376_384,
    "Llama-3.2-3B": 3_212_749_824,
    "Qwen3-4B": 4_022_468_096,
    "gemma-3-1b": 999_885_952,
    "LFM2-700M": 742_489_344,
    "LFM2-1.2B": 1_170_340_608,
    "LFM2-2.6B": 2_569_272_320,
    "LFM2-8B-A1B": 8_339_930_560,
    "Granite-4.0-H-350M": 339_814_112,
    "Granite-4.0-H-1B": 1_461_538_368,
    "Granite-4.0-H-Micro": 3_191_396_096,
    "Granite-4.0-H-Tiny": 6_939_037_248,
}
"""Parameters of models that are not in real_configs.py."""


@pytest.mark.parametrize("name", [*MORE, *sorted(MODELS.keys() & REAL.keys())])
def test_parameters_are_those_that_are_published(name: str) -> None:
    assert phone_table.need(MODELS[name]).parameters == (MORE[name] if name in MORE else REAL[name][0])


def test_file_is_as_large_as_a_real_one(example_files: ExampleFiles, chat_file: Path) -> None:
    config = json.loads((EXAMPLE / "config.json").read_text("utf-8"))
    estimate = phone_table.need(config)
    tokenizer = phone_table.TOKENIZER_BYTES * config["vocab_size"]
    tensors = GGUFFile(chat_file).tensors.values()  # made without calibration, so that it has no norm biases
    assert estimate.files[2] - tokenizer == sum(tensor.nbytes for tensor in tensors)
    for bits, path in ((2, example_files.d2q2), (3, example_files.d2q3)):
        assert estimate.files[bits] == pytest.approx(path.stat().st_size, rel=0.02)


def test_cache() -> None:
    """By hand, and as llama-completion -v says: gemma3 of 7 layers, 2 heads of 64, window 512, "KV buffer size"."""
    qwen = MODELS["Qwen3-0.6B"]
    # keys and values, 28 layers, 8 heads of 128, two bytes
    assert phone_table.cache_bytes(family_for(qwen)) == 2 * 28 * 8 * 128 * 2 * 4096
    assert phone_table.cache_bytes(family_for(qwen), 1024) == 2 * 28 * 8 * 128 * 2 * 1024
    gemma = family_for(MODELS["gemma-3-1b"])
    # 4 of 26 layers see everything; the others keep 512 + 512 tokens
    assert phone_table.cache_bytes(gemma) == (4 * 4096 + 22 * 1024) * 2 * 256 * 2
    assert phone_table.cache_bytes(gemma, 600) == 26 * 600 * 2 * 256 * 2
    window = {**MODELS["gemma-3-1b"], "sliding_window": 513}
    assert phone_table.cache_bytes(family_for(window)) == (4 * 4096 + 22 * 1280) * 2 * 256 * 2, "a multiple of 256"


def test_blocks_without_attention() -> None:
    """By hand, as llama.cpp computes n_embd_r and n_embd_s."""
    lfm = family_for(MODELS["LFM2-700M"])
    # 6 of 16 blocks have attention, 8 heads of 64; the others keep two inputs of 1536 channels.
    assert phone_table.cache_bytes(lfm) == 6 * 2 * 8 * 64 * 2 * 4096 + 10 * 2 * 1536 * 4
    qwen = family_for(MODELS["Qwen3.5-0.8B"])
    # 6 of 24 have attention, 2 heads of 256; the others 16 states of 128 x 128, and three inputs of 6144 channels.
    assert phone_table.cache_bytes(qwen) == 6 * 2 * 2 * 256 * 2 * 4096 + 18 * 4 * (16 * 128 * 128 + 3 * 6144)


def test_phones() -> None:
    own = Need(1, {2: 2**30, 3: 2**30 + 1}, 2**30)
    assert (own.total(2), own.phone(2), own.phone(3)) == (2**31, "4 GB", "6 GB")
    assert Need(1, {2: 7 * 2**30}, 0).phone(2) == "none"


def test_the_document_has_this_table() -> None:
    result = CliRunner().invoke(phone_table.main)
    assert result.exit_code == 0
    document = (ROOT / "docs" / "phone.md").read_text("utf-8")
    assert result.stdout in document, "python tools/phone_table.py"
    assert result.stdout.count("\n") == len(MODELS) + 2
