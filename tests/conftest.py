"""Fixtures that several test files share: tiny random checkpoints, and llama.cpp's own converter as an oracle."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import write_checkpoint

# Runs the converter with its table of tokenizer hashes bypassed, because it can't know our tokenizers' hashes.
ORACLE = """
import runpy, sys
root, pre = sys.argv[1:3]
sys.path[:0] = [root, root + "/gguf-py"]
sys.argv[:] = ["convert_hf_to_gguf.py", *sys.argv[3:]]
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
runpy.run_path(root + "/convert_hf_to_gguf.py", run_name="__main__")
"""


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """make(family="qwen3", *, name="tiny", dtype, shards, **config): see `write_checkpoint`; returns the directory."""

    def make(family: str = "qwen3", *, name: str = "tiny", **options: Any) -> Path:
        write_checkpoint(tmp_path / name, family, **options)
        return tmp_path / name

    return make


@pytest.fixture
def stock_convert(tmp_path: Path) -> Callable[[Path, str, str], Path]:
    """convert(model, type, pre): the file that llama.cpp's converter makes of a model; skips where there is none.

    The converter is taken from the llama.cpp tree named by the environment variable D2Q_LLAMA_CPP. `pre` is the
    pre-tokenizer's name, which it would otherwise look up by hash.
    """
    root = os.environ.get("D2Q_LLAMA_CPP")
    if not root:
        pytest.skip("D2Q_LLAMA_CPP doesn't name a llama.cpp source tree")

    def convert(model: Path, type_name: str, pre: str) -> Path:
        out = tmp_path / f"stock-{model.name}-{type_name}.gguf"
        arguments = [root, pre, str(model), "--outtype", type_name, "--outfile", str(out)]
        result = subprocess.run([sys.executable, "-c", ORACLE, *arguments], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return out

    return convert
