"""llama.cpp's own converter, run in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# Runs the converter with its table of tokenizer hashes bypassed, because it can't know our tokenizers' hashes.
ORACLE = """
import json, runpy, sys
root, pre, jobs = sys.argv[1:]
sys.path[:0] = [root, root + "/gguf-py"]
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
for arguments in json.loads(jobs):
    sys.argv[:] = ["convert_hf_to_gguf.py", *arguments]
    runpy.run_path(root + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def convert(tree: Path, pre: str, jobs: Sequence[tuple[Path, str, Path]]) -> None:
    """Convert models.

    Args:
        tree: the unpacked source distribution of llama-cpp-python.
        pre: the pre-tokenizer's name, which the converter would otherwise look up by hash.
        jobs: model directory, type and output of each.
    """
    root = tree / "vendor/llama.cpp"
    arguments = [[str(model), "--outtype", type_name, "--outfile", str(out)] for model, type_name, out in jobs]
    for (model, _, _), each in zip(jobs, arguments, strict=True):
        if "qwen3_5" in (model / "config.json").read_text():
            # Without the layers that predict further tokens, which we leave out as well.
            each.append("--no-mtp")
    # Importing it must not leave __pycache__ in the tree.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", ORACLE, str(root), pre, json.dumps(arguments)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
