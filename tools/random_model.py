"""Write a checkpoint with a real model's shapes and random weights, to measure time and memory of a conversion.

    python -m tools.random_model qwen3-8b DIRECTORY [--layers N] [--device cuda]

The tokenizer is the bundled example's; it has fewer tokens than the embedding matrix has rows, which does no harm.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from d2q_edge.model.families import family_for

EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny-qwen3"
SHARD_BYTES = 4 * 2**30
GEOMETRIES: dict[str, dict[str, Any]] = {
    "qwen3-8b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
    },
    "llama-3.2-1b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
    },
}


def write_model(name: str, directory: Path, layers: int | None, device: torch.device, seed: int = 0) -> None:
    """Write config, tokenizer and shards of at most 4 GiB.

    Args:
        name: a key of GEOMETRIES.
        directory: the output; created if it doesn't exist.
        layers: number of blocks; None for the real model's.
        device: where random numbers are drawn.
        seed: for the random numbers.
    """
    config = {**GEOMETRIES[name], "hidden_act": "silu", "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16"}
    if layers is not None:
        config["num_hidden_layers"] = layers
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    for file in EXAMPLE.glob("tokenizer*"):
        shutil.copyfile(file, directory / file.name)
    generator = torch.Generator(device).manual_seed(seed)
    parts: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for tensor, shape in family_for(config).tensor_shapes().items():
        size += 2 * torch.Size(shape).numel()
        if size > SHARD_BYTES:
            parts.append({})
            size = 2 * torch.Size(shape).numel()
        parts[-1][tensor] = shape
    placed: dict[str, str] = {}
    for number, part in enumerate(tqdm(parts, unit="shard", disable=None)):
        file_name = f"model-{number + 1:05}-of-{len(parts):05}.safetensors"
        placed |= dict.fromkeys(part, file_name)
        save_file({tensor: _draw(tensor, shape, generator) for tensor, shape in part.items()}, directory / file_name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.bfloat16)
    # Norms near one, and linear layers whose outputs are about as large as their inputs.
    drawn = 1 + 0.1 * values if len(shape) == 1 else values / shape[1] ** 0.5
    return drawn.to("cpu", torch.bfloat16)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Write a random checkpoint of a real model's geometry.")
    parser.add_argument("name", choices=sorted(GEOMETRIES))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    arguments = parser.parse_args()
    write_model(arguments.name, arguments.directory, arguments.layers, arguments.device)


if __name__ == "__main__":
    main()
