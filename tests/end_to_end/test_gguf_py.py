"""The lines in docs/files.md with which gguf-py reads our files."""

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch

from d2q_edge.formats import tensor_types
from d2q_edge.formats.gguf_reader import GGUFFile
from d2q_edge.formats.gguf_writer import GGUFTensor, write_gguf
from tests.command_line import run_python
from tests.paths import ROOT

READ = """
import json, sys
from gguf import GGUFReader
tensors = GGUFReader(sys.argv[1]).tensors
found = {t.name: [t.tensor_type.name, t.shape.tolist(), t.data.tobytes().hex()] for t in tensors}
print(json.dumps(found))
"""


def test_the_snippet_reads_our_types(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = {own.name: rng.integers(0, 256, (3, own.row_bytes(512)), np.uint8) for own in tensor_types.ALL}
    tensors = [GGUFTensor(f"{name}.weight", (3, 512), name, partial(np.asarray, data)) for name, data in rows.items()]
    tensors.append(GGUFTensor("norm.weight", (8,), "f32", lambda: torch.ones(8)))
    path = tmp_path / "ours.gguf"
    write_gguf(path, "llama", tensors, lambda _: None)

    plain = run_python("-c", READ, path)
    assert plain.err.endswith("80) is not a valid GGMLQuantizationType\n")
    (snippet,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/files.md").read_text(), re.MULTILINE | re.DOTALL)
    read = run_python("-c", snippet + READ, path)
    assert read.code == 0, read.err
    expected = {f"{name}.weight": [name.upper(), [512, 3], data.tobytes().hex()] for name, data in rows.items()}
    expected["norm.weight"] = ["F32", [8], GGUFFile(path).raw("norm.weight").tobytes().hex()]
    assert json.loads(read.out) == expected
