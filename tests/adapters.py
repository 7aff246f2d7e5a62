"""Write LoRA adapters as peft 0.21 saves them: names and settings are those that it wrote for the same modules."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from d2q_edge.model.checkpoint import Checkpoint

RANK, ALPHA = 4, 12
PREFIX = "base_model.model."
CONFIG: dict[str, Any] = {
    "base_model_name_or_path": "tiny-org/base",
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "lora_alpha": ALPHA,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": RANK,
    "target_modules": ["q_proj"],
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
}

Tensors = dict[str, torch.Tensor]


def write_adapter(
    directory: Path,
    model: Path,
    modules: Iterable[str],
    *,
    ranks: Mapping[str, int] | None = None,
    replaced: Iterable[str] = (),
    prefix: str = PREFIX,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Path:
    """Write an adapter with random weights.

    Args:
        directory: to be made.
        model: the checkpoint that it is for.
        modules: full names of layers, or of the embeddings.
        ranks: of modules with another one than RANK.
        replaced: names of tensors that were trained in full.
        prefix: of all names.
        dtype: of all tensors.
        settings: changes of CONFIG.
    """
    generator = torch.Generator().manual_seed(5)
    shapes = Checkpoint.open(model)
    tensors = {}
    for module in modules:
        rank = (ranks or {}).get(module, RANK)
        rows, columns = shapes.shape("model.embed_tokens.weight" if module == "lm_head" else f"{module}.weight")
        if module.endswith("embed_tokens"):
            made: dict[str, tuple[int, ...]] = {"lora_embedding_A": (rank, rows), "lora_embedding_B": (columns, rank)}
        else:
            made = {"lora_A.weight": (rank, columns), "lora_B.weight": (rows, rank)}
        if settings.get("use_dora"):
            made["lora_magnitude_vector"] = made[next(name for name in made if "_B" in name)][:1]
        for name, shape in made.items():
            values = torch.randn(shape, generator=generator) * 0.1
            tensors[f"{prefix}{module}.{name}"] = (values.abs() + 0.5 if "magnitude" in name else values).to(dtype)
    for name in replaced:
        shape = shapes.shape("model.embed_tokens.weight" if name == "lm_head.weight" else name)
        tensors[f"{prefix}{name}"] = (torch.randn(shape, generator=generator) * 0.1).to(dtype)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps({**CONFIG, **settings}))
    return directory


def rewrite_adapter(directory: Path, change: Callable[[Tensors], object]) -> None:
    """Load an adapter's tensors, change them and save them."""
    tensors = load_file(directory / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, directory / "adapter_model.safetensors")


def configure(directory: Path, **settings: Any) -> None:
    """Change an adapter's settings."""
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
