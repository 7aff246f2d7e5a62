"""Fixtures that several test files share: tiny random checkpoints, and llama.cpp's own converter as an oracle."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from d2q_edge.families import family_for

EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny-qwen3"
LLAMA_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
BASE_CONFIG: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 4100,
}
FAMILY_CONFIG: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "bos_token_id": 4093, "eos_token_id": 4095},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32},
}
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


def _write_tokenizer(directory: Path, family: str) -> None:
    """The example's tokenizer; for llama with its regex, a BOS token and ignore_merges, as Llama 3 has them."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / name, directory)
    if family != "llama":
        return
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    content["normalizer"] = None
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = LLAMA_REGEX
    content["model"]["ignore_merges"] = True
    bos = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    text = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    template = {
        "type": "TemplateProcessing",
        "single": [bos, text[0]],
        "pair": [bos, text[0], bos, text[1]],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [4093], "tokens": ["<|endoftext|>"]}},
    }
    content["post_processor"] = {"type": "Sequence", "processors": [content["post_processor"], template]}
    path.write_text(json.dumps(content), "utf-8")
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8"))
    settings.update(
        bos_token="<|endoftext|>", eos_token="<|im_end|>", add_bos_token=True, chat_template="{{ messages }}"
    )
    path.write_text(json.dumps(settings), "utf-8")


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a tiny checkpoint with random weights and returns its directory.

    make(family="qwen3", *, dtype=torch.bfloat16, shards=1, name="tiny", **config): family is "llama", "qwen2" or
    "qwen3"; config overrides config.json's entries. Weights are small and seeded; norms are near one.
    """

    def make(
        family: str = "qwen3",
        *,
        dtype: torch.dtype = torch.bfloat16,
        shards: int = 1,
        name: str = "tiny",
        **config: Any,
    ) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        settings = {**BASE_CONFIG, **FAMILY_CONFIG[family], **config}
        (directory / "config.json").write_text(json.dumps(settings))
        generator = torch.Generator().manual_seed(0)
        tensors = {}
        for tensor, shape in family_for(settings).tensor_shapes().items():
            values = torch.randn(shape, generator=generator) * 0.05
            tensors[tensor] = (values + 1 if "norm" in tensor else values).to(dtype)
        if shards == 1:
            save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        else:
            weight_map = {}
            for index in range(shards):
                file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
                part = dict(list(tensors.items())[index::shards])
                save_file(part, directory / file, metadata={"format": "pt"})
                weight_map.update(dict.fromkeys(part, file))
            (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        _write_tokenizer(directory, family)
        return directory

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
