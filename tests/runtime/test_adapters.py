"""Adapters for --lora: FILE or FILE:SCALE, and files that llama.cpp must not see."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from d2q_edge.errors import D2QError
from d2q_edge.formats.gguf_writer import GGUFTensor, write_gguf
from d2q_edge.runtime.adapters import Adapter, parse_adapters


def write(name: str, kind: str = "f32", value: float = 1, alpha: Any = 1.0) -> None:
    """Write an adapter of one tensor."""

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        (writer.add_float32 if isinstance(alpha, float) else writer.add_string)("adapter.lora.alpha", alpha)

    tensor = GGUFTensor("a.lora_a", (1, 32), kind, lambda: np.full((1, 32), value, np.float32))
    write_gguf(Path(name), "qwen3", [tensor], add)


def test_scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("a.gguf")
    write("b:2")
    assert parse_adapters(["a.gguf", "a.gguf:0.5", "a.gguf:-1", "b:2", "b:2:3"]) == (
        Adapter(Path("a.gguf")),
        Adapter(Path("a.gguf"), 0.5),
        Adapter(Path("a.gguf"), -1),
        Adapter(Path("b:2")),
        Adapter(Path("b:2"), 3),
    )


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("none.gguf", "there is no file none.gguf"),
        ("none.gguf:0.5", "there is no file none.gguf$"),
        ("none.gguf:nan", "the scale of the adapter none.gguf must be a finite number, not nan"),
        (".", "is a directory; `d2q-edge adapter` makes a GGUF file"),
        ("bad.gguf", "isn't a LoRA adapter: its general.type is None"),
        ("alpha.gguf", "adapter.lora.alpha isn't a finite float"),
        ("type.gguf", "has a q4_0 tensor, a.lora_a; adapters have f32"),
        ("infinite.gguf", "adapter.lora.alpha isn't a finite float"),
        ("nan.gguf", "is damaged: NaN or infinity in a.lora_a"),
    ],
)
def test_files_for_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)

    write_gguf(Path("bad.gguf"), "qwen3", [], lambda _: None)
    write("alpha.gguf", alpha="1")
    write("infinite.gguf", alpha=float("inf"))
    write("type.gguf", "q4_0")
    write("nan.gguf", value=float("nan"))
    with pytest.raises(D2QError, match=message):
        parse_adapters([entry])
