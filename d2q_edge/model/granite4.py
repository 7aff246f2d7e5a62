"""Present a dense Granite 4 as the Granite 3 that it is, and name the tensors of a hybrid one as its family does.

The checkpoints (GraniteMoeHybridForCausalLM) are those of a hybrid mixture of experts. Without state-space blocks and
experts, what is left is Granite's block, and llama.cpp's converter (conversion/granite.py, GraniteHybridModel) also
writes such a model as one of the architecture "granite". It adds keys of the parts that are not there, which llama.cpp
doesn't read and we leave out. In all of them gate and up are one tensor, and so are all experts; both are cut.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from d2q_edge.errors import D2QError
from d2q_edge.model.families.experts import MAX_EXPERTS
from d2q_edge.model.weight_files import TensorEntry

ARCHITECTURE = "GraniteMoeHybridForCausalLM"
ATTENTION = ("attention", "full_attention")
_MLP, _EXPERTS, _ROUTER = ".shared_mlp.", ".block_sparse_moe.", ".block_sparse_moe.router.layer."


@dataclass(frozen=True)
class _Rows(TensorEntry):
    """Some rows of a tensor, or of one of the matrices that are stacked in it."""

    whole: TensorEntry
    start: int
    part: int | None = None

    def load(self) -> torch.Tensor:
        tensor = self.whole.load()
        matrix = tensor if self.part is None else tensor[self.part]
        return matrix[self.start : self.start + self.shape[0]]


def is_granite4(config: Mapping[str, Any]) -> bool:
    """Return whether config.json describes a Granite 4, dense or not."""
    architectures = config.get("architectures")
    return isinstance(architectures, list) and architectures[:1] == [ARCHITECTURE]


def granite_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of the same model as a GraniteForCausalLM, or as it is if it has state-space blocks.

    Raises:
        D2QError: it has attention in all blocks, and experts or no rotary embedding.
    """
    types, layers = config.get("layer_types"), config.get("num_hidden_layers")
    if not isinstance(types, list) or len(types) != layers or not all(kind in ATTENTION for kind in types):
        return dict(config)
    if config.get("num_local_experts", 8) != 0:
        raise D2QError(
            f"config.json: {ARCHITECTURE} with attention in every block (layer_types) is supported without experts "
            "only (num_local_experts)"
        )
    if config.get("position_embedding_type") != "rope":
        raise D2QError("config.json: position_embedding_type must be rope, which llama.cpp's granite always has")
    left_out = ("layer_types", "num_local_experts", "num_experts_per_tok", "shared_intermediate_size")
    kept = {key: value for key, value in config.items() if key not in left_out and not key.startswith("mamba_")}
    width = config.get("shared_intermediate_size", 1024)
    return {**kept, "architectures": ["GraniteForCausalLM"], "model_type": "granite", "intermediate_size": width}


def granite_entries(entries: Mapping[str, TensorEntry], *, dense: bool) -> dict[str, TensorEntry]:
    """Name the tensors as Granite 3's (dense) or GraniteHybrid's, and cut those that hold several layers.

    Raises:
        D2QError: one has an odd shape.
    """
    result: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        new = name.replace(_ROUTER, f"{_MLP}router.").replace(_EXPERTS, f"{_MLP}experts.")
        new = new.replace(_MLP, ".mlp.") if dense else new
        if ".input_linear." not in new and ".output_linear." not in new:
            result[new] = entry
            continue
        parts = (None,) if ".experts." not in new else range(_experts(name, entry))
        for part in parts:
            own = new if part is None else new.replace(".experts.", f".experts.{part}.")
            result.update(_layers(own, entry, part))
    return result


def _experts(name: str, entry: TensorEntry) -> int:
    """Return the number of experts that a tensor holds."""
    if len(entry.shape) != 3 or entry.shape[0] > MAX_EXPERTS:
        raise D2QError(f"tensor {name} in {entry.file} has the shape {list(entry.shape)}: it must be those of experts")
    return entry.shape[0]


def _layers(name: str, entry: TensorEntry, part: int | None) -> Iterator[tuple[str, TensorEntry]]:
    """Yield the layers in a tensor, or in one of the matrices stacked in it, with their names."""
    shape = entry.shape if part is None else entry.shape[1:]
    if ".output_linear." in name:
        own = entry if part is None else _Rows(entry.file, entry.name, entry.dtype, shape, entry, 0, part)
        yield name.replace(".output_linear.", ".down_proj."), own
        return
    if len(shape) != 2 or shape[0] % 2:
        raise D2QError(f"tensor {entry.name} in {entry.file} has the shape {list(entry.shape)}: it must be gate and up")
    half = shape[0] // 2
    for layer, start in (("gate_proj", 0), ("up_proj", half)):
        cut = _Rows(entry.file, entry.name, entry.dtype, (half, shape[1]), entry, start, part)
        yield name.replace(".input_linear.", f".{layer}."), cut
