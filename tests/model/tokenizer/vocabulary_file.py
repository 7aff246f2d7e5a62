"""Write GGUF files with a tokenizer only: ours, and those of llama.cpp's converter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf

from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.model.tokenizer import Tokenizer

# Converts several vocabularies in one process, which takes seconds to start. The table of tokenizer hashes is bypassed,
# because it can't know ours.
_ORACLE = """
import json, runpy, sys
root = sys.argv[1]
sys.path[:0] = [root, root + "/gguf-py"]
import conversion.base
for model, pre, out in json.loads(sys.argv[2]):
    conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
    sys.argv[1:] = [model, "--vocab-only", "--outfile", out]
    runpy.run_path(root + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def write_vocabulary(
    path: Path, tokenizer: Tokenizer, *, architecture: str = "llama", space_prefix: bool = False
) -> Path:
    """Write a GGUF with the tokenizer's keys."""
    writer = gguf.GGUFWriter(path, architecture)
    tokenizer.add_to(writer, space_prefix=space_prefix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def tokenizer_keys(path: Path) -> list[tuple[str, Any]]:
    """Return the tokenizer's keys and values, in the order of the file."""
    return [(key, value) for key, value in GGUFFile(path).kv.items() if key.startswith("tokenizer.")]


def convert_vocabularies(root: Path, models: dict[Path, str], out: Path) -> dict[str, Path]:
    """Convert models, {directory: pre-tokenizer}, by llama.cpp's converter in the tree `root`; by directory name."""
    files = {model.name: out / f"stock-{model.name}.gguf" for model in models}
    jobs = [[str(model), pre, str(files[model.name])] for model, pre in models.items()]
    result = subprocess.run(
        [sys.executable, "-c", _ORACLE, str(root), json.dumps(jobs)],
        capture_output=True,
        text=True,
        # Importing it must not leave __pycache__ in the tree.
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert result.returncode == 0, result.stderr
    return files
