"""Train LoRA adapters for a model with torch, and save them as peft does."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.adapters import CONFIG, PREFIX

RANK, ALPHA = 8, 16


class LoraLinear(nn.Module):
    """A frozen linear layer with an adapter."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(RANK, base.in_features) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, inputs: torch.Tensor) -> Any:
        return self.base(inputs) + ALPHA / RANK * (inputs @ self.a.T) @ self.b.T


def train_adapter(
    directory: Path, model: Path, layers: Iterable[str], text: str, *, steps: int, batch: int = 4, window: int = 64
) -> Path:
    """Train the layers with these last names ("q_proj") on a text, and write the adapter to a new directory."""
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).requires_grad_(False)
    tokens = AutoTokenizer.from_pretrained(model)(text, return_tensors="pt").input_ids[0]
    wrapped = {}
    for name, layer in list(module.named_modules()):
        if name.rpartition(".")[2] in layers:
            parent, _, last = name.rpartition(".")
            wrapped[name] = LoraLinear(layer)
            setattr(module.get_submodule(parent), last, wrapped[name])
    optimizer = torch.optim.AdamW([p for each in wrapped.values() for p in (each.a, each.b)], lr=3e-3, weight_decay=0)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - window, (batch,))
        rows = torch.stack([tokens[start : start + window] for start in starts])
        loss = module(rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    directory.mkdir()
    tensors = {f"{PREFIX}{name}.lora_A.weight": each.a.detach().contiguous() for name, each in wrapped.items()}
    tensors |= {f"{PREFIX}{name}.lora_B.weight": each.b.detach().contiguous() for name, each in wrapped.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {**CONFIG, "r": RANK, "lora_alpha": ALPHA, "target_modules": sorted(layers)}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory
